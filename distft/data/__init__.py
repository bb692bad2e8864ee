"""Training data as it lies on disk, without torch."""
