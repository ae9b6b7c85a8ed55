"""What a training that is a trial of a search (``hparams_search=``) finds of it, in whatever process it runs.

The search says in Hydra's own part of a job's config which trial it is, so that the run's config, and with it its
identity, is that of the same run without a search.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

if TYPE_CHECKING:
    import lightning.pytorch as pl
    import optuna


def trial_callbacks() -> list[pl.Callback]:
    """What reports and prunes this training; empty where it is no trial, or nothing prunes."""
    if not HydraConfig.initialized():
        return []
    cfg: Any = HydraConfig.instance().cfg
    trial = OmegaConf.select(cfg, "hydra.sweeper.trial", default=None)
    monitor = OmegaConf.select(cfg, "hydra.sweeper.monitor", default=None)
    if OmegaConf.is_list(monitor) and len(monitor) == 1:
        monitor = monitor[0]
    # Optuna prunes by one figure.
    if trial is None or not isinstance(monitor, str) or OmegaConf.select(cfg, "hydra.sweeper.pruner") is None:
        return []
    from ornstein.training.callbacks.pruning import TrialPruning

    sweeper: Any = cfg.hydra.sweeper
    return [TrialPruning(monitor, open_trial=partial(_open_trial, sweeper, int(trial)))]


def _open_trial(sweeper: Any, number: int) -> optuna.Trial:
    import optuna
    from hydra.utils import instantiate

    from ornstein.training.trials import build_pruner, open_storage, quiet_optuna

    with quiet_optuna():
        pruner = instantiate(sweeper.pruner) if OmegaConf.is_config(sweeper.pruner) else sweeper.pruner
        storage = open_storage(str(sweeper.storage))
        study = optuna.load_study(
            study_name=str(sweeper.study_name),
            storage=storage,
            sampler=optuna.samplers.RandomSampler(),  # asked for nothing: the trial has its values
            pruner=build_pruner(pruner, n_startup_trials=int(sweeper.n_startup_trials)),
        )
        study_id = storage.get_study_id_from_name(study.study_name)
        return optuna.Trial(study, storage.get_trial_id_from_study_id_trial_number(study_id, number))
