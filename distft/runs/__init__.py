"""The run directory, and what is known of a run. Read and written on login nodes and by ranks."""
