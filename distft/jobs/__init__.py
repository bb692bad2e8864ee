"""Where a job runs and what it consists of, before anything is written or started."""
