"""Checkpoints in and out: written whole or not at all, read without running anybody's code."""

import os
import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from ornstein.errors import OrnsteinError
from ornstein.experiment.atomic import replace_file
from ornstein.experiment.plain_state import to_plain
from ornstein.experiment.run_dir import is_whole_checkpoint, newest_whole_checkpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint plugin with three promises of its own; ``Trainer(plugins=[AtomicCheckpointIO()])``.

    - A checkpoint is written to a temporary file in its own folder, flushed to the disk and moved into place.
      (Lightning's own goes through the system's temporary folder: to another file system that is a copy.)
    - It holds tensors and plain types only (:func:`ornstein.experiment.plain_state.to_plain`).
    - It is read with ``weights_only=True``, whatever the caller asks for.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Write ``checkpoint`` to the local file ``path``, replacing what was there.

        Raises:
            OrnsteinError: for a file name with ``=`` in it, for content that is neither tensor nor plain, and
                where the file cannot be written; whatever ``path`` held before is untouched then.
            TypeError: for ``storage_options``, which this plugin has no use for.
        """
        if storage_options is not None:
            raise TypeError("AtomicCheckpointIO takes no storage_options: call save_checkpoint without")
        if "=" in Path(path).name:
            raise OrnsteinError(
                f"the checkpoint name {Path(path).name!r} holds '=', which the command line cannot take: "
                "set auto_insert_metric_name: false and a file name without '='"
            )
        plain = to_plain(checkpoint)
        try:
            replace_file(path, lambda file: torch.save(plain, file))
        except (OSError, RuntimeError) as error:  # torch's own name for a write that failed is RuntimeError
            reason = _refused(error)
            if reason is None:
                raise
            good = newest_whole_checkpoint(Path(path).parent)
            kept = f"the last good checkpoint is {good}" if good is not None else "no checkpoint had been written yet"
            raise OrnsteinError(
                f"checkpoint {path} could not be written ({reason}): make room or choose another folder; {kept}"
            ) from error

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Any | None = "cpu",
        weights_only: bool | None = True,
    ) -> dict[str, Any]:
        """Read a checkpoint, onto the CPU unless ``map_location`` says otherwise.

        ``weights_only`` is there for Lightning's sake: False is not honoured.

        Raises:
            OrnsteinError: where the file is missing, cut short or damaged (naming the newest good one beside
                it), or holds objects that only code of unknown origin could restore.
        """
        path = Path(path)
        if not path.is_file():
            raise OrnsteinError(f"there is no checkpoint {path}{_instead(path, '; the newest there is')}")
        if not is_whole_checkpoint(path):
            raise _damaged(path)
        try:
            loaded = torch.load(path, map_location=map_location, weights_only=True)
        except pickle.UnpicklingError as error:
            if not is_whole_checkpoint(path, thorough=True):
                raise _damaged(path) from None
            reason = next((line.strip() for line in str(error).splitlines() if "GLOBAL" in line), "foreign objects")
            raise OrnsteinError(
                f"checkpoint {path} holds more than tensors and plain types ({reason[:160]}): it was not "
                "written by this project, and reading it could run code of unknown origin"
            ) from None
        except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
            raise _damaged(path) from error
        if not isinstance(loaded, dict):
            raise OrnsteinError(
                f"{path} holds a {type(loaded).__name__}, not a checkpoint: name a file of checkpoints/"
            )
        return loaded


def _refused(error: BaseException | None) -> str | None:
    """What the file system said, of an error or what lies behind it; None where it was not asked."""
    while error is not None:
        if isinstance(error, OSError):
            return error.strerror or str(error)
        error = error.__cause__ or error.__context__
    return None


def _damaged(path: Path) -> OrnsteinError:
    return OrnsteinError(
        f"checkpoint {path} is cut short or damaged{_instead(path, '; the newest good one beside it is')}"
        " (resume from that one, or copy the file again)"
    )


def _instead(path: Path, lead: str) -> str:
    good = newest_whole_checkpoint(path.parent, but=path, thorough=True) if path.parent.is_dir() else None
    return f"{lead} {good}" if good is not None else "; there is no other in its folder"
