"""``hydra/launcher=parallel`` and ``local``: joblib's and submitit's launchers, which survive a job that is killed."""
