"""The ``placement`` command: click commands and their rendering."""

from placement.intact import require_intact

require_intact()
