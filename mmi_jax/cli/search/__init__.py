"""`mmi search`."""
