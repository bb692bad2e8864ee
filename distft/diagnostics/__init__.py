"""Whether machines can train: the preflight of a job, and `distft doctor`."""
