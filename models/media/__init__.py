"""Videos and images from files, streams and arrays."""
