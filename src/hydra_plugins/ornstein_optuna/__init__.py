"""``hydra/sweeper=optuna``: a multirun whose jobs are the trials of an Optuna study."""
