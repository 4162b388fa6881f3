"""Checks of a result before it is timed."""
