"""Starts of ``ornstein train`` that are killed at given moments: ``python killed_starts.py PLAN`` (test_kills.py).

Everything is imported once; each start is a fork that runs the command's own ``main`` and is ended by SIGKILL, as a
command of its own would be. Before it dies it says where it is: faulthandler's trace, to a file beside its log.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import ornstein  # isort: skip  # noqa: F401  (its guard comes before Lightning imports torchvision)
from ornstein.cli.train import main

# What a start imports as it goes along.
for name in (
    *("lightning.pytorch", "wandb", "torch.utils.data", "PIL.PngImagePlugin", "sklearn.datasets"),
    *("ornstein.cli.build", "ornstein.cli.validate", "ornstein.cli.resume", "ornstein.cli.announce"),
    *("ornstein.experiment", "ornstein.data", "ornstein.networks", "ornstein.training.callbacks"),
):
    importlib.import_module(name)

PATIENCE = 120.0
EVALUATED = 20  # steps between evaluations, as test_kills.py sets them


def start(arguments: list[str], log: Path) -> int:
    """A child that trains; its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        trace = open(log.with_suffix(".trace"), "w")  # noqa: SIM115  (for as long as the process lives)
        faulthandler.register(signal.SIGRTMIN, file=trace, all_threads=True)
        sys.argv = ["train.py", *arguments]
        main()
        sys.stdout.flush()
        os._exit(0)
    except SystemExit as stop:
        sys.stdout.flush()
        os._exit(stop.code if isinstance(stop.code, int) else 1)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(70)


def seen(folder: Path, moment: str) -> Any:
    """What changes in the run's folder when such a moment begins."""
    if moment == "checkpoint":
        return [path.name for path in folder.glob("checkpoints/.*.tmp")]
    if moment == "rows":
        return (folder / "metrics.csv").stat().st_mtime_ns if (folder / "metrics.csv").exists() else 0
    if moment == "evaluation":  # the newest row that is due for one, which it follows
        text = (folder / "metrics.csv").read_text() if (folder / "metrics.csv").exists() else ""
        steps = [int(line.partition(",")[0]) for line in text.split("\n")[1:-1]]
        return max((step for step in steps if step % EVALUATED == 0), default=0)
    return len(list(folder.glob("samples/*.png")))


def kill_at(pid: int, folder: Path, *, moment: str, delay: float, log: Path) -> int | None:
    """Waits for the moment and ``delay`` seconds more, and kills; the exit status where it ended before that."""
    began, before = time.monotonic(), seen(folder, moment) if moment != "clock" else None
    due = began + delay if moment == "clock" else None
    while due is None or time.monotonic() < due:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if due is None:
            now = seen(folder, moment)
            if moment == "evaluation" and now < before:  # cut away, to be written again
                before = now
            if now != before or time.monotonic() > began + PATIENCE:
                due = time.monotonic() + delay
        time.sleep(0.0005)
    os.kill(pid, signal.SIGRTMIN)
    # The main thread's comes last.
    trace, patience = log.with_suffix(".trace"), time.monotonic() + 0.1
    while (not trace.exists() or "in <module>" not in trace.read_text()) and time.monotonic() < patience:
        time.sleep(0.0002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def run(plan: dict[str, Any]) -> None:
    """Run A whole; run B killed as planned, each time gone on with, and at last to its end."""
    root, settings = Path(plan["root"]), plan["settings"]
    os.chdir(root)
    began = time.monotonic()
    whole = start([*settings, f"hydra.run.dir={root}/whole"], root / "whole.log")
    first_row = None
    while not (ended := os.waitpid(whole, os.WNOHANG))[0]:
        if first_row is None and (root / "whole" / "metrics.csv").exists():
            first_row = time.monotonic() - began
        time.sleep(0.01)
    took = time.monotonic() - began
    assert os.waitstatus_to_exitcode(ended[1]) == 0, (root / "whole.log").read_text()[-3000:]
    to_first = first_row if first_row is not None else took
    told = []
    folder = root / "runs" / "train" / "day" / "time"
    for number, kill in enumerate(plan["kills"]):
        # What the clock is set by: the share of what it takes to the first row, or some seconds after it.
        delay = kill["share"] * to_first if kill["moment"] == "clock" else kill["delay"]
        arguments = command(settings, folder, root)
        log = root / f"start_{number:02}.log"
        status = kill_at(start(arguments, log), folder, moment=kill["moment"], delay=delay, log=log)
        told.append({"status": status, "by": arguments[-2:] if status is None else None, **kill})
        if status is not None:
            break
    last = start(command(settings, folder, root), root / "last.log")
    status = os.waitstatus_to_exitcode(os.waitpid(last, 0)[1])
    (root / "told.json").write_text(json.dumps({"starts": told, "last": status, "whole_s": took, "first_s": to_first}))


def command(settings: list[str], folder: Path, root: Path) -> list[str]:
    """``resume=FOLDER`` where there is a checkpoint and every other time; else ``resume=auto``, which finds the run."""
    command.calls = getattr(command, "calls", 0) + 1  # type: ignore[attr-defined]
    if list(folder.glob("checkpoints/*.ckpt")) and command.calls % 2:  # type: ignore[attr-defined]
        return [f"resume={folder}"]
    where = f"hydra.run.dir={folder}" if not folder.exists() else f"hydra.run.dir={root}/runs/train/day/other"
    return [*settings, f"paths.output_root={root}/runs", "resume=auto", where]


if __name__ == "__main__":
    run(json.loads(Path(sys.argv[1]).read_text()))
