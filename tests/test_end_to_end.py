import contextlib
import json
import os
import sqlite3
import subprocess
import sys

import pytest
from conftest import ROOT

SETTINGS = {
    "resolution": 8, "draw.count": 96, "draw.shard-size": 48, "train.preset": "tiny", "train.steps": 20,
    "train.global-batch-size": 16, "train.workers": 1, "generate.count": 20, "generate.shard-size": 8,
    "generate.steps": 3, "evaluate.samples": 8, "evaluate.edits": 4, "evaluate.steps": 3,
    "evaluate.feature-steps": 20, "evaluate.curve-samples": 8, "evaluate.likelihood": 2,
    "evaluate.likelihood-steps": 2, "evaluate.bootstrap": 20,
}  # fmt: skip
FLAGS = [word for name, value in SETTINGS.items() for word in (f"--{name}", str(value))]


def python(*arguments, home):
    environment = {**os.environ, "PREFECT_HOME": str(home), "MPLCONFIGDIR": str(home)}
    environment.pop("RAY_AUTH_MODE", None)
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=290,
        check=False,
    )


def artifacts(home):
    """What the flows of a Prefect home left to look at: the last data of every key."""
    with contextlib.closing(sqlite3.connect(home / "prefect.db")) as base:
        rows = base.execute("select key, data from artifact where key is not null order by created").fetchall()
    return {key: json.loads(str(data)) for key, data in rows}


@pytest.mark.timeout(600)
def test_the_demo_goes_from_nothing_to_a_report_and_finds_its_results_again(tmp_path):
    store = tmp_path / "store"
    first = python("flows.py", "demo", "--store", str(store), *FLAGS, home=tmp_path / "prefect")
    assert first.returncode == 0, first.stdout + first.stderr
    assert f"{store}/report.html" in first.stdout.splitlines()[-1]
    assert "ingest: found 96 = kept" in first.stdout
    assert "ETA" in first.stdout
    report = json.loads((store / "report.json").read_text())
    assert set(report["seconds"]) == {"draw", "ingest", "train", "generate", "evaluate"}
    assert {each["known_bytes_changed"] for each in report["figures"]["inpainting"].values()} == {0}
    assert not report["promotion"]["live"], "twenty steps are too few for the gate"
    assert "?class_accuracy >= 0.5: fails with 0" in report["promotion"]["told"]
    assert "The model is not live" in (store / "report.html").read_text()
    assert report["figures"]["bulk"]["count"] == 20
    assert report["training"]["curves"]["curve"][-1][0] == 20
    page = (store / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert "http" not in page.replace("http://www.w3.org", "").replace("https://matplotlib.org", "").replace(
        "http://purl.org", ""
    ).replace("http://creativecommons.org", ""), "the page opens from disk and asks nothing of the network"
    kept = artifacts(tmp_path / "prefect")
    stages = ("ingest", "train", "generate", "evaluate")
    assert {
        "report",
        "promotion",
        *(f"{stage}-{what}" for stage in stages for what in ("figures", "pictures", "progress")),
    } <= set(kept)
    assert {figure["figure"]: figure["value"] for figure in json.loads(kept["generate-figures"])}["made"] == "20"
    assert "](data:image/png;base64," in kept["generate-pictures"]
    assert float(kept["train-progress"]) == 100
    again = python("flows.py", "demo", "--store", str(store), *FLAGS, home=tmp_path / "prefect")
    assert again.returncode == 0, again.stdout + again.stderr
    for stage in ("draw", "ingest", "train", "generate", "evaluate"):
        assert f"{stage}: found {store}" in again.stdout
