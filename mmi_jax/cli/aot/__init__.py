"""`mmi aot`."""
