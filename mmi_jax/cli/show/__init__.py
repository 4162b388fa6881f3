"""`mmi show`."""
