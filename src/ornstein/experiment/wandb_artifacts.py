"""What W&B keeps of a run beside its rows: the config, the code and the model, as artifacts; and where a run belongs.

All files of an artifact lie in the folder of the W&B segment, so that an offline run can be uploaded later from there,
whatever has become of the files since.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ornstein.experiment.code_archive import write_code

_LONGEST_TAG = 64  # W&B refuses longer ones


def sweep_of(run_dir: Path) -> str | None:
    """A name of the multirun that the run in ``run_dir`` is a job of, from its sweep's folder; None of a single run."""
    for folder in run_dir.resolve().parents:
        if (folder / "multirun.yaml").is_file():
            parts = folder.parts
            inside = parts[parts.index("multirun") + 1 :] if "multirun" in parts else ()
            return "-".join(["sweep", *(inside or (folder.name,))])
    return None


def tags_of(choices: Mapping[str, Any]) -> list[str]:
    """``group=option`` of each choice that is something, as they are typed."""
    chosen = {group: str(option) for group, option in choices.items() if option not in (None, "none", "null")}
    return [f"{group}={option}"[:_LONGEST_TAG] for group, option in chosen.items()]


def log_beginning(run: Any, run_dir: Path, *, code: bool, config: Mapping[str, Any]) -> None:
    """Logs ``config.yaml`` with ``environment.json``, and with ``code`` the sources, as artifacts ``config-<id>`` and
    ``code``. Equal code is one version of the latter, however many runs have it.

    Raises:
        OSError: from the file system.
    """
    import wandb

    folder = _folder(run)
    files = [run_dir / name for name in ("config.yaml", "environment.json") if (run_dir / name).is_file()]
    if files:
        artifact = wandb.Artifact(f"config-{run.id}", type="config")
        for file in files:
            _add(artifact, Path(shutil.copy2(file, folder / file.name)))
        run.log_artifact(artifact)
    if code:
        archive = folder / "code.zip"
        write_code(archive, package=Path(__file__).resolve().parents[1], config=config)
        artifact = wandb.Artifact("code", type="code")
        _add(artifact, archive)
        run.log_artifact(artifact)


def log_model(run: Any, run_dir: Path, which: str | bool) -> None:
    """Logs the checkpoints of a run as the artifact ``model-<id>``.

    ``best``: ``best.ckpt``, or ``last.ckpt`` where there is none, and the averaged weights beside it; ``all``: all
    there are; false: only where they lie, as references, which uploads nothing.

    Raises:
        OSError: from the file system.
    """
    import wandb

    checkpoints = run_dir / "checkpoints"
    files = sorted([*checkpoints.glob("*.ckpt"), *checkpoints.glob("*.safetensors")])
    if which == "best":
        best = "best" if (checkpoints / "best.ckpt").is_file() else "last"
        files = [file for file in files if file.name.split(".")[0] == best]
    if not files:
        return
    artifact = wandb.Artifact(f"model-{run.id}", type="model", metadata={"folder": str(checkpoints.resolve())})
    for file in files:
        if which:
            kept = _folder(run) / file.name
            kept.unlink(missing_ok=True)
            try:
                os.link(file, kept)  # checkpoints are replaced, never written into
            except OSError:
                shutil.copyfile(file, kept)
            _add(artifact, kept)
        else:
            artifact.add_reference(file.resolve().as_uri(), name=file.name, checksum=False)
    run.log_artifact(artifact)


def _folder(run: Any) -> Path:
    """Where a W&B run's artifacts wait for their upload."""
    folder = Path(run.dir).parent / "artifacts"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _add(artifact: Any, file: Path) -> None:
    """Adds a file that stays as it is, so that W&B need not copy it into folders of its own."""
    artifact.add_file(str(file), name=file.name, policy="immutable", skip_cache=True)
