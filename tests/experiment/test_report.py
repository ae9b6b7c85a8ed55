"""The report: what it reads of run folders, whole and broken ones, and what a browser makes of the page."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from ornstein.cli.report import report
from ornstein.errors import OrnsteinError
from ornstein.experiment.report.collect import differing, find_runs, flat, read_run
from ornstein.experiment.report.curves import thinned
from ornstein.experiment.report.page import write_report


def run_folder(folder, *, model="dit", seed=0, fid=1.0, status="finished", error=None, steps=(100, 200)):
    """A run's folder as training leaves it, with figures of our choosing."""
    (folder / "samples").mkdir(parents=True)
    (folder / ".hydra").mkdir()
    config = {
        "model": {"network": {"width": 8 if model == "dit" else 16}},
        "seed": seed,
        "paths": {"run_dir": str(folder)},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump([f"model={model}", f"seed={seed}"]))
    summary = {"status": status, "error": error, "train_time_s": 10.0 * (seed + 1), "parameters": 1000}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "evaluation.json").write_text(
        json.dumps({"values": {"fid_1k": fid, "kid": fid / 10}, "sampling": {"nfe": 50}, "num_samples": 1000})
    )
    rows = "".join(f"{step},{step * 64},{step / 4},{1 / step},{2 / step},{4 / step}\n" for step in range(10, 210, 10))
    levels = "loss_by_log_snr/below_-8,loss_by_log_snr/0_to_2"
    (folder / "metrics.csv").write_text(f"step,images_seen,time/wall_s,train/loss,{levels}\n" + rows)
    for step in steps:
        Image.new("RGB", (16, 16), (seed * 40, step, 0)).save(folder / "samples" / f"step_{step:06}.png")
    return folder


@pytest.fixture
def sweep(tmp_path):
    """Ten runs and a failed one, beside a damaged folder."""
    for number in range(11):
        ended = (
            {"status": "failed", "error": "OrnsteinError: the loss is </script> not a number"} if number == 10 else {}
        )
        model = "dit" if number % 2 else "pixel_unet"
        run_folder(tmp_path / str(number), model=model, seed=number, fid=20.0 - number, **ended)
    (tmp_path / "11").mkdir()
    (tmp_path / "11" / "config.yaml").write_text("a: [1")
    return tmp_path


def test_runs_are_found_in_natural_order_and_broken_ones_are_told(sweep):
    records = [read_run(folder, root=sweep) for folder in find_runs(sweep)]
    assert [record.name for record in records] == [str(number) for number in range(12)]
    assert [record.status for record in records] == ["finished"] * 10 + ["failed", "damaged"]
    assert "config.yaml" in str(records[11].reason) and "not a number" in str(records[10].reason)
    first = records[0]
    assert first.figures == {
        **{"fid_1k": 20.0, "kid": 2.0, "nfe": 50.0, "num_samples": 1000.0},
        **{"train_time_s": 10.0, "parameters": 1000.0},
    }
    assert first.curves["train/loss"][:2] == [0.1, 0.05] and first.curves["step"][-1] == 200
    assert [(picture.kind, picture.step) for picture in first.pictures] == [("step", 100), ("step", 200)]
    assert differing([record.asked for record in records]) == ["model", "seed"]
    assert differing([record.config for record in records]) == ["model.network.width", "seed"]


def test_nested_configs_become_dotted_keys():
    assert flat({"a": {"b": 1, "c": {"d": None}}, "e": [1, 2]}) == {"a.b": 1, "a.c.d": None, "e": "[1, 2]"}


def test_a_folder_without_runs_is_refused(tmp_path):
    for place, words in ((tmp_path, "holds no run"), (tmp_path / "no", "is no folder")):
        with pytest.raises(OrnsteinError, match=words):
            report(place)
    run_folder(tmp_path / "a")
    with pytest.raises(OrnsteinError, match="--pictures 0"):
        report(tmp_path, pictures=0)
    with pytest.raises(OrnsteinError, match="could not be written"):
        report(tmp_path, out=tmp_path / "a" / "config.yaml" / "report.html")


def test_a_page_is_one_file_without_addresses_of_others(sweep):
    failures = [{"name": "12", "status": "failed", "reason": "model=dit cannot take data=faces"}]
    text = write_report(sweep, max_pictures=1, failures=failures).read_text()
    body = text[: text.index('<script type="application/json"')]
    assert "http" not in body and "src=" not in body and "<link" not in body
    start = text.index('id="data">') + len('id="data">')
    data = json.loads(text[start : text.index("</script>", start)].replace("<\\/", "</"))
    assert len(data["runs"]) == 12 and data["failures"] == failures and data["main"] == "fid_1k"
    assert data["differing"] == ["asked: model", "asked: seed"]
    assert [picture["step"] for picture in data["runs"][0]["pictures"]] == [200]
    assert data["runs"][10]["reason"].count("</script>") == 1


def page_data(path):
    text = path.read_text()
    start = text.index('id="data">') + len('id="data">')
    return json.loads(text[start : text.index("</script>", start)].replace("<\\/", "</"))


def test_a_large_sweep_stays_small_and_shows_what_matters_most(tmp_path):
    """Of runs with films of noise, which no format makes small, the page keeps its size and every run's newest grid."""
    noise = np.random.default_rng(0)
    for number in range(3):
        folder = run_folder(tmp_path / str(number), seed=number)
        frames = [Image.fromarray(noise.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(20)]
        frames[0].save(folder / "samples" / "trajectory_000200.gif", save_all=True, append_images=frames[1:])
        frames[0].resize((150, 150)).save(folder / "samples" / "best_and_worst.png")
        (folder / "samples" / "damaged.png").write_bytes(b"no picture" * 100_000)
    most = 5_150_000  # the plotting library takes 4.8
    path = write_report(tmp_path, max_bytes=most)
    data = page_data(path)
    assert path.stat().st_size <= most
    for run in data["runs"]:
        kinds = [(picture["kind"], picture["step"]) for picture in run["pictures"]]
        assert ("step", 200) in kinds and ("best_and_worst", None) in kinds
    films = [p["src"] for run in data["runs"] for p in run["pictures"] if p["kind"] == "trajectory (film)"]
    assert films and all(film.startswith("data:image/webp") for film in films)
    assert data["left_out"] >= 3, "what cannot be made smaller is left out, and that is told"


def test_long_curves_are_thinned_and_keep_their_ends():
    rows = 5000
    log = [float(row) / 7 if row % 10 == 0 else None for row in range(rows)]
    val = [float(row) if row in (1234, rows - 1) else None for row in range(rows)]
    found = thinned({"step": list(range(rows)), "loss": log, "val": val}, 100)
    assert 100 <= len(found["step"]) <= 300 and len({len(column) for column in found.values()}) == 1
    assert [(s, v) for s, v in zip(found["step"], found["val"], strict=True) if v is not None] == [
        (1234, 1234),
        (4999, 4999),
    ]
    kept = [(s, v) for s, v in zip(found["step"], found["loss"], strict=True) if v is not None]
    assert kept[0] == (0, 0) and kept[-1] == (4990, 712.86), "five digits"
    assert thinned({"a": [1.0, None, float("nan")]}, 100) == {"a": [1]}


def test_runs_of_several_folders_stand_on_one_page(tmp_path, monkeypatch):
    for place in ("a/x", "b", "c"):
        run_folder(tmp_path / place)
    monkeypatch.chdir(tmp_path)
    path = report(Path("a"), Path("b"), tmp_path / "b")
    assert path == Path("report.html") and [run["name"] for run in page_data(path)["runs"]] == ["a/x", "b"]
    with pytest.raises(OrnsteinError, match="--megabytes 1 "):
        report(tmp_path, megabytes=1)


def test_jobs_that_are_known_to_have_failed_say_so(tmp_path):
    run_folder(tmp_path / "0", status="running")
    (tmp_path / "1" / ".hydra").mkdir(parents=True)
    (tmp_path / "1" / ".hydra" / "overrides.yaml").write_text("[model=dit, '+own=${seed}']")
    told = [{"name": name, "status": "failed", "reason": "killed"} for name in ("0", "1", "2")]
    data = page_data(write_report(tmp_path, failures=told))
    assert [(run["name"], run["status"], run["reason"]) for run in data["runs"]] == [
        ("0", "failed", "killed"),
        ("1", "failed", "killed"),
    ]
    assert data["runs"][1]["config"] == {"asked: model": "dit", "asked: own": "${seed}"}
    assert [each["name"] for each in data["failures"]] == ["2"], "of which there is nothing to read"


@pytest.mark.slow
def test_a_browser_sorts_plots_and_compares(sweep):
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (binary and driver):
        pytest.skip("no chromium and chromedriver here: apt-get install chromium chromium-driver")
    from selenium import webdriver
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select, WebDriverWait

    path = write_report(sweep, failures=[{"name": "12", "status": "failed", "reason": "refused"}])
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for word in ("headless", "no-sandbox", "disable-gpu", "disable-background-networking", "disable-dev-shm-usage"):
        options.add_argument(f"--{word}")
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(driver)) as browser:
        browser.get(path.as_uri())
        WebDriverWait(browser, 30).until(
            lambda page: page.find_element(By.TAG_NAME, "body").get_attribute("data-ready")
        )

        def column(number):
            rows = browser.find_elements(By.CSS_SELECTOR, "#table tbody tr")
            return [row.find_elements(By.TAG_NAME, "td")[number].text for row in rows]

        heads = [head.text.split()[0] for head in browser.find_elements(By.CSS_SELECTOR, "#table th")]
        assert heads[:5] == ["run", "status", "model", "seed", "fid_1k"]
        assert column(4) == [*map(str, range(10, 21)), ""], "sorted by the main figure, the best first"
        browser.find_elements(By.CSS_SELECTOR, "#table th")[3].click()
        assert column(3) == [*map(str, range(11)), ""]
        browser.find_elements(By.CSS_SELECTOR, "#table th")[3].click()
        assert column(3) == [*map(str, range(10, -1, -1)), ""], "runs without a value stay last"
        failures = [item.text for item in browser.find_elements(By.CSS_SELECTOR, "#failures li")]
        assert len(failures) == 3 and failures[-1] == "12 (failed): refused"

        assert len(browser.find_elements(By.CSS_SELECTOR, "#curve-plots .plot")) == 1, "of levels there is a heat map"
        assert len(browser.find_elements(By.CSS_SELECTOR, "#curve-plots .scatterlayer .trace")) == 11
        assert browser.find_elements(By.CSS_SELECTOR, "#heat-plot .heatmaplayer .hm")
        last = "return document.querySelector('#curve-plots .plot').data[0].x.at(-1)"
        assert browser.execute_script(last) == 200
        for axis, value in (("images_seen", 200 * 64), ("time/wall_s", 50)):
            Select(browser.find_element(By.ID, "curve-x")).select_by_value(axis)
            # The browser tells of a choice a moment after it is made.
            WebDriverWait(browser, 10).until(lambda page: page.execute_script(last) == value)  # noqa: B023
            assert browser.execute_script("return document.getElementById('heat-plot').data[0].x.at(-1)") == value
        assert len(browser.find_elements(By.CSS_SELECTOR, "#trade-plot .scatterlayer .trace")) == 3, (
            "two models, one front"
        )
        assert browser.find_elements(By.CSS_SELECTOR, "#parallel-plot .parcoords")
        pictures = browser.find_elements(By.CSS_SELECTOR, "#picture-grid img")
        assert len(pictures) == 11 and all(picture.get_property("naturalWidth") == 16 for picture in pictures)
        browser.find_element(By.CSS_SELECTOR, "#table tbody tr").click()  # hides one
        assert len(browser.find_elements(By.CSS_SELECTOR, "#picture-grid img")) == 10
        Select(browser.find_element(By.ID, "picture-seed")).select_by_value("7")
        WebDriverWait(browser, 10).until(
            lambda page: len(page.find_elements(By.CSS_SELECTOR, "#picture-grid img")) == 1
        )
        browser.find_element(By.ID, "filter").send_keys("pixel_unet")
        assert len(column(0)) == 6
        Select(browser.find_element(By.ID, "trade-x")).select_by_value("train_time_s")
        assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
