"""The Ray shell: the only package that imports Ray. Actors convert, call one core function, enact."""

from placement.intact import require_intact

require_intact()
