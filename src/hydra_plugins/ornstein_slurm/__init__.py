"""``hydra/launcher=slurm``: submitit's SLURM launcher, which also notices jobs that left no word."""
