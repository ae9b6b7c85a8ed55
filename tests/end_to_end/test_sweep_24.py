"""A sweep of 24 runs of which two fail: 22 results, two named failures, one report; and taking it up runs those two."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path

import pytest

# A user's own callback, in a file of the user's own: it stumbles in two of the jobs until a file is there.
STUMBLES = """
    from pathlib import Path

    import lightning.pytorch as pl


    class Stumbles(pl.Callback):
        def __init__(self, *, model: str, seed: int, mended: str) -> None:
            self.stumbles = model == "dit" and seed == 1 and not Path(mended).exists()

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            if self.stumbles and type(pl_module.schedule).__name__ == "Flow" and trainer.global_step == 2:
                raise RuntimeError("node 7 has lost its disk")
"""
NAMES = "model=class_unet,dit scheduler=linear,cosine,flow objective=x0,v seed=0,1"
FAILING = {"21", "23"}  # dit, flow, x0 and v, seed 1


def command_line(tmp_path: Path, tiny, sweep: Path) -> list[str]:
    # Two networks have no number in common: both in their own size, which for three steps is small enough.
    small = [word for word in tiny() if not word.startswith(("model", "data.limit"))]
    return [
        *NAMES.split(),
        *small,
        "data.limit=32",
        "sampler.steps=2",
        "callbacks.sample_grid.every=2",
        "+callbacks.stumbles._target_=ornstein_test_stumbles.Stumbles",
        "+callbacks.stumbles.model=${hydra:runtime.choices.model}",
        "+callbacks.stumbles.seed=${seed}",
        f"+callbacks.stumbles.mended={tmp_path / 'mended'}",
        f"hydra.sweep.dir={sweep}",
    ]


def page_data(sweep: Path) -> dict:
    text = (sweep / "report.html").read_text()
    start = text.index('id="data">') + len('id="data">')
    return json.loads(text[start : text.index("</script>", start)].replace("<\\/", "</"))


@pytest.mark.slow
def test_24_runs_of_which_two_fail(command, tiny, tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "ornstein_test_stumbles.py").write_text(textwrap.dedent(STUMBLES))
    sweep, own = tmp_path / "sweep", [tmp_path / "own"]
    done = command("train.py", "-m", *command_line(tmp_path, tiny, sweep), cwd=tmp_path, path=own)
    assert done.returncode == 1
    assert "24 jobs, 22 finished, 2 failed" in done.stdout
    named = dict(re.findall(r"job (\d+) failed: (.*)", done.stdout))
    assert set(named) == FAILING and all("RuntimeError: node 7 has lost its disk" in why for why in named.values())
    for objective in ("x0", "v"):
        assert f"asked: model=dit scheduler=flow objective={objective} seed=1\n" in done.stdout

    data = page_data(sweep)
    assert [run["name"] for run in data["runs"]] == [str(number) for number in range(24)] and not data["failures"]
    failed = {run["name"]: run["reason"] for run in data["runs"] if run["status"] != "finished"}
    assert set(failed) == FAILING and all("node 7 has lost its disk" in why for why in failed.values())
    assert {key.removeprefix("asked: ") for key in data["differing"]} == {"model", "scheduler", "objective", "seed"}
    for run in data["runs"]:
        if run["name"] not in FAILING:
            assert run["figures"]["loss"] > 0 and "step" in {picture["kind"] for picture in run["pictures"]}
    assert (sweep / "report.html").stat().st_size < 15_000_000

    before = {path: path.stat().st_mtime_ns for path in sweep.glob("*/checkpoints/last.ckpt")}
    (tmp_path / "mended").touch()
    again = command("train.py", "-m", f"sweep.resume={sweep}", cwd=tmp_path, path=own)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("nothing to do") == 22 and "24 jobs, 24 finished, 0 failed" in again.stdout
    touched = {path for path in sweep.glob("*/checkpoints/last.ckpt") if before.get(path) != path.stat().st_mtime_ns}
    assert {path.parts[-3] for path in touched} == FAILING
    assert {run["status"] for run in page_data(sweep)["runs"]} == {"finished"}
    # The two went on with their own third step, and every step stands in their rows once.
    for job in FAILING:
        rows = (sweep / job / "metrics.csv").read_text().splitlines()[1:]
        assert [int(row.partition(",")[0]) for row in rows if int(row.partition(",")[0])] == [1, 2, 3]
