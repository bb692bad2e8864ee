"""Training data on disk, without torch."""
