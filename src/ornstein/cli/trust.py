"""Which classes a stored config may name: this package's own and a short list of libraries' parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ornstein.errors import OrnsteinError

_PARTS = ("ornstein.", "torch.optim.", "lightning.pytorch.", "diffusers.schedulers.")


def targets(config: Any) -> Iterator[str]:
    """Every ``_target_`` in a nested config."""
    if isinstance(config, dict):
        target = config.get("_target_")
        if isinstance(target, str):
            yield target
        for value in config.values():
            yield from targets(value)
    elif isinstance(config, list):
        for value in config:
            yield from targets(value)


def check_targets(config: Any, trusted: Sequence[str] = ()) -> None:
    """Refuses a stored config that would call something this package does not know.

    A name counts as ours when it is a public class or function defined in the module that it names, so that a path
    through one of our modules into another library does not pass.

    Raises:
        OrnsteinError: names the target and the flag that allows it.
    """
    for target in targets(config):
        if any(target == prefix or target.startswith(prefix.rstrip(".") + ".") for prefix in trusted):
            continue
        if not target.startswith(_PARTS) or (target.startswith("ornstein.") and not _is_ours(target)):
            module = target.rpartition(".")[0]
            raise OrnsteinError(
                f"the run's config names {target}, which is not part of this package: if you trust it, add "
                f"trust_targets=[{module}]."
            )


def _is_ours(target: str) -> bool:
    from importlib import import_module

    module_name, _, name = target.rpartition(".")
    try:
        found = getattr(import_module(module_name), name)
    except (ImportError, AttributeError):
        return False
    return str(getattr(found, "__module__", "")).startswith("ornstein.") and callable(found)
