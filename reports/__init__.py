"""reports: what was recorded, and what it means.  `python -m reports --help`."""
