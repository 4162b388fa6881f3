"""`mmi bench`."""
