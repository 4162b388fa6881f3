"""`mmi prefill`."""
