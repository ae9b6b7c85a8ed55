"""What is logged of the machine, and the utilisation of a device that is known."""

from __future__ import annotations

import mmap
import time

import pytest
import torch

from ornstein.errors import OrnsteinError
from ornstein.training.callbacks import Throughput, TrainingLog
from ornstein.training.callbacks.device_stats import DeviceMeter, peak_tflops
from ornstein.training.estimate import forward_flops


@pytest.mark.parametrize(
    ("name", "precision", "tf32", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16-mixed", False, 312.0),
        ("NVIDIA A100-SXM4-80GB", "32-true", False, 19.5),
        ("NVIDIA A100-SXM4-80GB", "32-true", True, 156.0),
        ("NVIDIA A10", "16-mixed", False, 125.0),
        ("NVIDIA H100 80GB HBM3", "bf16-true", False, 989.4),
        ("NVIDIA H100 PCIe", "bf16-mixed", False, 756.0),
        ("NVIDIA GH200 480GB", "bf16-mixed", False, 989.4),
        ("NVIDIA L40S", "bf16-mixed", False, 362.0),
        ("NVIDIA GeForce RTX 4090", "32-true", False, 82.6),
        ("Tesla V100-SXM2-16GB", "16-mixed", False, 125.0),
        # half of an H100's memory is no half of an H100's speed
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16-mixed", False, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16-mixed", False, None),
        ("NVIDIA GeForce RTX 3090 Ti", "bf16-mixed", False, None),
        ("NVIDIA A100-SXM4-80GB", "64-true", False, None),
        ("Some other accelerator", "bf16-mixed", False, None),
    ],
)
def test_peaks(name: str, precision: str, tf32: bool, expected: float | None) -> None:
    assert peak_tflops(name, precision, tf32=tf32) == expected


def test_meter_tells_busy_from_idle_and_what_memory_is_held() -> None:
    meter = DeviceMeter()
    time.sleep(0.1)
    idle = meter.figures(torch.device("cpu"))
    began = time.process_time()
    while time.process_time() - began < 0.1:
        pass
    busy = meter.figures(torch.device("cpu"))
    assert set(idle) == {"system/cpu_share", "system/memory_mb"}
    assert 0 <= idle["system/cpu_share"] < busy["system/cpu_share"]
    # Pages of the system's own: what malloc gives may have been resident before.
    with mmap.mmap(-1, 64_000_000) as held:
        for place in range(0, len(held), mmap.PAGESIZE):
            held[place] = 1
        # A page or two of other things may have gone meanwhile.
        assert meter.figures(torch.device("cpu"))["system/memory_mb"] - busy["system/memory_mb"] > 60


def test_rows_hold_operations_a_second_and_utilisation(fit, rows, make_module) -> None:
    logger, module, clock = rows(), make_module(), Throughput(peak_tflops=0.5)
    clock.forward_flops = forward_flops(module)
    fit([TrainingLog(every=2, levels_every=None), clock], steps=4, logger=logger, module=module)
    for step in (2, 4):
        row = logger.rows[step]
        # three forward passes a step: one forward, two of work backward
        assert row["time/tflops"] == pytest.approx(3 * clock.forward_flops * row["time/images_per_s"] / 1e12)
        assert row["time/mfu"] == pytest.approx(row["time/tflops"] / 0.5)
        assert row["system/memory_mb"] > 1 and row["system/cpu_share"] >= 0
    assert logger.rows[2]["time/wall_s"] <= logger.rows[4]["time/wall_s"]


def test_unknown_devices_and_unknown_costs_have_no_utilisation(fit, rows) -> None:
    logger = rows()
    fit([TrainingLog(every=2, levels_every=None), Throughput()], steps=2, logger=logger)
    assert not {"time/tflops", "time/mfu"} & set(logger.rows[2])


@pytest.mark.parametrize("peak", [0, -1.0, True])
def test_refuses_a_peak_that_is_none(peak: float) -> None:
    with pytest.raises(OrnsteinError, match=r"callbacks\.throughput\.peak_tflops"):
        Throughput(peak_tflops=peak)
