"""Where jobs run: this machine (local) or SLURM."""
