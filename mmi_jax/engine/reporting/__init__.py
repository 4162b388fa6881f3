"""Reports of a prefill and profiles of its device time."""
