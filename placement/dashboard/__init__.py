"""The live map in the browser, ``placement dashboard``: docs/dashboard.md says what it shows and whom it lets in.

``server`` serves the page and follows the service, ``source`` asks it through a process of its own (``__main__``),
``view`` makes of its answers what the page shows, and ``static/`` is the page.
"""
