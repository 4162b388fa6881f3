"""Measurements behind `mmi bench`: outputs checked first, baseline and candidate in one process on one device."""
