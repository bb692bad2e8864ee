"""Where a job runs, and everything that it consists of, before anything is written or started."""
