"""`mmi niah`."""
