"""`mmi qa`."""
