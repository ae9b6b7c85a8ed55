"""The process in which ``trainer.find_batch_size=true`` tries batch sizes: one JSON line in, one out, a size each.

    python -m ornstein.cli.batch_trial FOLDER LOCAL_RANK

``FOLDER`` holds the run's config as ``job.yaml``. A line is ``{"size": 32, "cap": 2000000000, "of": 128}``, the answer
``{"peak": 812345344}``, ``{"peak": null}`` where it does not fit, or ``{"error": "..."}``.
"""

from __future__ import annotations

import json
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ornstein.cli.batch_size import JOB
from ornstein.cli.failures import out_of_memory, release_memory

GPU_SHARE = 0.9  # of the free memory of a device
STEPS = 2  # the second has the optimizer's moments beside it
# How oneDNN, which computes convolutions on CPUs, says that it was refused memory.
_REFUSED = re.compile(r"could not (create|execute) a primitive|could not create a memory", re.IGNORECASE)


def main() -> None:
    """Answers until nobody asks any more."""
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever else speaks
    folder, local_rank = Path(sys.argv[1]), int(sys.argv[2])
    trial: Trial | None = None
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            if trial is None:
                trial = Trial(folder, local_rank)
            answer: dict[str, Any] = {"peak": trial.peak(asked["size"], of=asked["of"], cap=asked["cap"])}
        except Exception as error:
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:500]}
        print(json.dumps(answer), file=answers, flush=True)


class Trial:
    """The run's data, once, and its module and trainer, anew for each size."""

    def __init__(self, folder: Path, local_rank: int) -> None:
        import lightning.pytorch  # noqa: F401  (under the cap nothing is left to import)

        from ornstein.cli.build import build_data
        from ornstein.cli.latents import open_latents
        from ornstein.cli.launch import register_resolvers
        from ornstein.cli.quiet import quiet_libraries

        quiet_libraries()
        register_resolvers()
        cfg = OmegaConf.load(folder / JOB)
        assert isinstance(cfg, DictConfig)
        self.cfg, self.ranks = cfg, _on_one_device(cfg, local_rank)
        cfg.paths.run_dir = str(folder / "run")
        cfg.callbacks, cfg.logger = {}, {}
        settings: dict[str, Any] = {
            "max_steps": STEPS,
            "limit_val_batches": 0,
            "num_sanity_val_steps": 0,
            "profiler": None,
        }
        settings |= {"strategy": "auto", "num_nodes": 1, "enable_progress_bar": False}
        cfg.trainer = {**cfg.trainer, **settings}
        cfg.trainer.default_root_dir = cfg.paths.run_dir
        self.data = build_data(cfg)
        self.data.setup()
        open_latents(cfg, self.data)

    def peak(self, size: int, *, of: int, cap: int | None) -> int | None:
        """Bytes that training at micro-batches of ``size`` takes at most; None where that does not fit."""
        import torch

        on_gpu = torch.cuda.is_available() and self.cfg.trainer.accelerator in ("auto", "gpu", "cuda")
        if cap is not None and not on_gpu and _resident() > cap:
            return None
        try:
            with _device_share(self.cfg, cap) if on_gpu else _limited(cap):
                self._train(size, of)
        except Exception as error:
            if not (out_of_memory(error) or _REFUSED.search(str(error)) is not None):
                raise
            return None
        finally:
            release_memory()
        held = torch.cuda.max_memory_reserved() if on_gpu else _resident_peak()
        return None if cap is not None and held > cap else held

    def _train(self, size: int, of: int) -> None:
        import torch

        from ornstein.cli.autoencoder import build_autoencoder, trains_autoencoder
        from ornstein.cli.build import build_callbacks, build_module, build_trainer, matmul_precision

        cfg = self.cfg
        cfg.data.batch_size = size
        # Of accumulated steps the second is the largest: gradients are there already.
        cfg.trainer.accumulate_grad_batches = min(2, of // size)
        with matmul_precision(cfg.model.get("matmul_precision")):
            trainer = build_trainer(cfg, callbacks=build_callbacks(cfg))
            module: Any = (
                build_autoencoder(cfg, fresh=True) if trains_autoencoder(cfg) else build_module(cfg, fresh=True)
            )
            # Several devices keep what they send each other of gradients beside them.
            sent = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
            ballast = torch.ones(sent if self.ranks > 1 else 0, dtype=torch.uint8, device=trainer.strategy.root_device)
            self.data.batch_size, self.data.start_batch = size, 0
            trainer.fit(module, self.data)
            del ballast


def _on_one_device(cfg: DictConfig, local_rank: int) -> int:
    """Leaves one device to the trial; gives how many the run asks for."""
    from ornstein.cli.job import devices_of

    asked = cfg.trainer.get("devices", 1)
    count = devices_of(cfg.trainer) * int(cfg.trainer.get("num_nodes", 1))
    import torch

    if torch.cuda.is_available() and cfg.trainer.accelerator in ("auto", "gpu", "cuda"):
        own = list(asked)[local_rank] if OmegaConf.is_list(asked) else local_rank
        cfg.trainer.devices = [int(own)]
    else:
        cfg.trainer.devices = 1
    return count


@contextmanager
def _device_share(cfg: DictConfig, cap: int | None) -> Iterator[None]:
    """Lets torch allocate so much of the device and no more."""
    import torch

    place = int(cfg.trainer.devices[0])
    free, total = torch.cuda.mem_get_info(place)
    held = torch.cuda.memory_reserved(place)
    torch.cuda.set_per_process_memory_fraction(min(1.0, (cap or GPU_SHARE * (free + held)) / total), place)
    torch.cuda.reset_peak_memory_stats(place)
    yield


@contextmanager
def _limited(cap: int | None) -> Iterator[None]:
    """Has the system refuse memory beyond ``cap``, as an error of the allocator: by what the process may still add.

    RLIMIT_DATA counts what is written to and not what is merely reserved, of which torch has several GB.
    """
    if cap is None or not Path("/proc/self/status").is_file():
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_DATA)
    room = max(cap - _resident(), 0)
    resource.setrlimit(resource.RLIMIT_DATA, (1024 * _status("VmData") + room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _status(key: str) -> int:
    """A figure of this process in KiB, as Linux has it."""
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) if found else 0


def _resident() -> int:
    return 1024 * _status("VmRSS")


def _resident_peak() -> int:
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    main()
