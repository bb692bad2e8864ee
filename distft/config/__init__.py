"""YAML to a Recipe or a Cluster, with all problems at once."""
