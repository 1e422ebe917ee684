"""What launchers and SLURM say about this process, read from the environment alone."""
