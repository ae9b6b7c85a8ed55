"""Models of transformers, from a folder or from the hub: its local cache first, and a quick answer where it is far."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ornstein.conditioning.encoders import probe_hub, quiet
from ornstein.metrics.features import WeightsMissing

T = TypeVar("T")


def load_model(name: str, load: Callable[[bool], T], *, what: str, download: bool = True) -> T:
    """What ``load(local_files_only)`` gives for the folder or hub name ``name``.

    Args:
        name: for the message, and to tell a folder from a name.
        load: calls ``from_pretrained`` of transformers; tried without network first.
        what: the kind of model, for the message: "a transformers CLIP with its tokenizer".
        download: a name that is not in the local cache may be downloaded.

    Raises: WeightsMissing, one sentence, if there is no such model at hand.
    """
    import transformers

    tries = [True] if Path(name).is_dir() or not download else [True, False]
    reason: Exception | None = None
    for local in tries:
        try:
            if not local:
                probe_hub()
            with quiet(transformers):
                return load(local)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            reason = error
    line = str(reason).strip().splitlines()[0] if str(reason).strip() else type(reason).__name__
    raise WeightsMissing(
        f"no model could be loaded from {name!r} ({line}); give a folder that holds {what}, or a hub name on a "
        "connected machine."
    ) from reason
