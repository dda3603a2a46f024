"""Self-contained HTML pages: the report of a run, and maps of images."""
