"""The live map in the browser, ``placement dashboard``: docs/dashboard.md says what it shows and who may look.

``server`` serves the page and follows the service, ``source`` asks it through a process of its own (``__main__``),
``view`` turns its answers into what the page shows, and ``static/`` is the page.
"""
