"""Compiled programs of the layers, and the cache that keeps executables on disk."""
