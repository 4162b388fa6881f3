"""Trials: what one is, what it measures, and the journal of those that are done."""
