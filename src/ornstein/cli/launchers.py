"""The launchers of plugins by their own names: ours, which no killed or lost job ends or keeps waiting."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from hydra.core.config_store import ConfigLoadError, ConfigStore
from hydra.core.plugins import Plugins

_OWN: dict[str, dict[str, Any]] = {
    "joblib": {"_target_": "hydra_plugins.ornstein_local.launcher.ParallelLauncher"},
    "submitit_local": {"_target_": "hydra_plugins.ornstein_local.launcher.LocalLauncher"},
    # Jobs of ours know how to go on after a time limit.
    "submitit_slurm": {"_target_": "hydra_plugins.ornstein_slurm.launcher.SlurmLauncher", "max_num_timeout": 100},
}


def use_own_launchers() -> None:
    """Puts ours behind the names of those plugins that are installed; their options stay as they are."""
    Plugins.instance()  # reads the plugins, of which each stores its options, once: nobody stores over these again
    store = ConfigStore.instance()
    for name, changes in _OWN.items():
        with suppress(ConfigLoadError):
            options = store.load(f"hydra/launcher/{name}.yaml").node
            options.update(changes)
            store.store(group="hydra/launcher", name=name, node=options, provider="ornstein")
