"""`mmi doctor`."""
