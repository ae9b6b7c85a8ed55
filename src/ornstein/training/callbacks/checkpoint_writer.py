"""Writes checkpoints at once, or from a copy while training goes on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO

Written = Callable[[Mapping[str, Any]], None]


class CheckpointWriter(CheckpointIO):
    """Stands between Lightning's strategy and the plugin that writes files, ``inner``.

    With ``asynchronous`` a checkpoint is copied to the host's memory when it is saved, and a thread has ``inner`` write
    the copy; one at a time, in order. Lightning's own plugin for this lets copies queue up without end, breaks tensors
    that share their storage apart, and raises what went wrong a checkpoint later.

    Attributes:
        then: called once, with the state, when the next checkpoint is written; by the thread that wrote it.
    """

    def __init__(self, inner: CheckpointIO, *, asynchronous: bool = False) -> None:
        self.inner = inner
        self.asynchronous = asynchronous
        self.then: Written | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Writes, or begins to. Raises what ``inner`` raises; what the thread before ran into, too."""
        self.wait()
        then, self.then = self.then, None
        if not self.asynchronous:
            self._write(checkpoint, path, storage_options, then)
            return
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        copied = host_copy(checkpoint)
        self._pending = self._thread.submit(self._write, copied, path, storage_options, then)

    def _write(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any, then: Written | None) -> None:
        self.inner.save_checkpoint(checkpoint, path, storage_options=storage_options)
        if then is not None:
            then(checkpoint)

    def wait(self) -> None:
        """Returns when nothing is being written any more. Raises what the thread ran into, once."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def look(self) -> None:
        """Raises what the thread ran into, if it has; does not wait."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def close(self) -> None:
        """Ends the thread. Raises as :meth:`wait` does."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)
            self._thread = None
        self.wait()

    def load_checkpoint(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        """As ``inner`` loads it, when nothing is being written any more."""
        self.wait()
        loaded: dict[str, Any] = self.inner.load_checkpoint(*arguments, **options)
        return loaded

    def remove_checkpoint(self, path: str | Path) -> None:
        """As ``inner`` removes it, when nothing is being written any more."""
        self.wait()
        self.inner.remove_checkpoint(path)


def host_copy(value: Any) -> Any:
    """A copy in the host's memory that nothing which happens to ``value`` later can change.

    Tensors that share their storage share that of the copy, so that a file made of it is the one made of ``value``.
    """
    return _copied(value, {})


def _copied(value: Any, storages: dict[int, torch.UntypedStorage]) -> Any:
    if isinstance(value, torch.Tensor):
        return _tensor_copy(value.detach(), storages)
    if isinstance(value, dict):
        return {key: _copied(item, storages) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copied(item, storages) for item in value)
    return copy.deepcopy(value)


def _tensor_copy(value: torch.Tensor, storages: dict[int, torch.UntypedStorage]) -> torch.Tensor:
    # Kinds without one flat storage (sparse, quantised, a subclass's) are copied one by one.
    if type(value) is not torch.Tensor or value.layout != torch.strided or value.is_quantized or value.is_meta:
        return value.cpu().clone()
    storage = value.untyped_storage()
    place = storage.data_ptr()
    if place not in storages:
        storages[place] = storage.cpu() if value.device.type != "cpu" else storage.clone()
    target = torch.empty(0, dtype=value.dtype, device="cpu")
    return target.set_(storages[place], value.storage_offset(), value.size(), value.stride())
