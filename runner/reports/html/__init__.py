"""Reports as self-contained HTML files: a page is data in Python, and one script in `assets/` draws it."""
