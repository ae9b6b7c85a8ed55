"""How busy a run keeps its machine, and how many operations a second its device could do at best."""

from __future__ import annotations

import os
import re
import time

import psutil
import torch

# Dense TFLOP/s without sparsity, of matrix products in (half precision with float32 sums, TF32, float32).
# Source: NVIDIA's data sheets of each product (for consumer cards the architecture's whitepaper). A row stands for the
# devices whose name holds all of its words; earlier rows come first, so a variant stands before its family.
PEAKS: tuple[tuple[frozenset[str], tuple[float, float, float]], ...] = tuple(
    (frozenset(words.split()), peaks)
    for words, peaks in (
        ("B200", (2250.0, 1125.0, 75.0)),
        ("GH200", (989.4, 494.7, 66.9)),
        ("H200", (989.4, 494.7, 66.9)),
        ("H100 PCIE", (756.0, 378.0, 51.2)),
        ("H100 NVL", (835.5, 417.8, 60.0)),
        ("H100", (989.4, 494.7, 66.9)),
        ("A100", (312.0, 156.0, 19.5)),
        ("A30", (165.0, 82.0, 10.3)),
        ("A40", (149.7, 74.8, 37.4)),
        ("A10", (125.0, 62.5, 31.2)),
        ("L40S", (362.0, 183.0, 91.6)),
        ("L40", (181.0, 90.5, 90.5)),
        ("L4", (121.0, 60.0, 30.3)),
        ("V100 PCIE", (112.0, 14.0, 14.0)),
        ("V100", (125.0, 15.7, 15.7)),
        ("T4", (65.0, 8.1, 8.1)),
        ("RTX A6000", (154.8, 77.4, 38.7)),
        ("RTX 4090", (165.2, 82.6, 82.6)),
        ("RTX 3090", (71.0, 35.6, 35.6)),
    )
)
# Slices, mobile and other variants of a name have other peaks.
_VARIANTS = frozenset({"TI", "SUPER", "LAPTOP", "MAX", "MIG", "D"})


def peak_tflops(device_name: str, precision: str, *, tf32: bool = False) -> float | None:
    """Most dense TFLOP/s of a device at a trainer's ``precision`` (``bf16-mixed``, ``32-true``); None where unknown.

    ``tf32``: float32 products may be computed in TF32 (``torch.set_float32_matmul_precision`` high or medium).
    """
    words = frozenset(word for word in re.split(r"[^A-Z0-9]+", device_name.upper()) if word)
    if words & _VARIANTS or precision.startswith("64"):
        return None
    half, with_tf32, single = next((peaks for name, peaks in PEAKS if name <= words), (None, None, None))
    return half if "16" in precision else with_tf32 if tf32 else single


class DeviceMeter:
    """What this process takes of its machine, since it was last asked. Asked when a row is due, never each step.

    Under several processes each row tells of the first one's own share: its device, its memory.
    """

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._last = (time.perf_counter(), time.process_time())

    def figures(self, device: torch.device) -> dict[str, float]:
        """Names and values.

        ``system/cpu_share`` (of all cores that the process may use, in [0, 1] or a little above) and
        ``system/memory_mb`` (resident, 10**6 bytes). On CUDA ``system/gpu_memory_mb`` and
        ``system/gpu_memory_peak_mb`` (allocated by torch, now and at most so far) and, where NVIDIA's management
        library is installed, ``system/gpu_share`` (of time in which a kernel ran, in [0, 1]).
        """
        before, now = self._last, (time.perf_counter(), time.process_time())
        self._last = now
        found = {
            "system/cpu_share": (now[1] - before[1]) / max(now[0] - before[0], 1e-9) / self._cores,
            "system/memory_mb": self._process.memory_info().rss / 1e6,
        }
        if device.type == "cuda":
            found["system/gpu_memory_mb"] = torch.cuda.memory_allocated(device) / 1e6
            found["system/gpu_memory_peak_mb"] = torch.cuda.max_memory_allocated(device) / 1e6
            share = _gpu_share(device)
            if share is not None:
                found["system/gpu_share"] = share
        return found


def _gpu_share(device: torch.device) -> float | None:
    """As the driver tells it; None where its library is missing or refuses (containers, slices of a device)."""
    try:
        return torch.cuda.utilization(device) / 100
    except Exception:  # the library's errors have a base of their own, and the library may be missing
        return None
