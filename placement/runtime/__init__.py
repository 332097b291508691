"""The Ray shell: the only package that imports Ray. Actors convert, call one core function, enact."""
