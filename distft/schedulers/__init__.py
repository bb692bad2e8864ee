"""Where a job runs: this machine, or a SLURM cluster."""
