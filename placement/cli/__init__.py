"""The ``placement`` command: click commands and their rendering."""
