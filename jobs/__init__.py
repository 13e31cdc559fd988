"""Entry points for `ray job submit`: argument parsing and nothing else."""
