"""Runs tasks as jobs of a Slurm cluster, and writes the files that start a sweep elsewhere."""
