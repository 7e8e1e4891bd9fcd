"""A run killed with SIGKILL at any moment and resumed ends bit for bit like one that was never killed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its children")
@pytest.mark.parametrize(("workers", "rounds"), [(0, 3), (1, 2)])
def test_killed_runs_end_bit_for_bit_like_a_whole_one(workers, rounds, tmp_path):
    found = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).with_name("kill_driver.py")),
            str(tmp_path),
            str(rounds),
            "7",
            str(workers),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    report = json.loads(found.stdout.splitlines()[-1])["rounds"]
    assert len(report) == rounds
    assert sum(len(entry["kills"]) for entry in report) >= rounds
    assert all(entry["identical"] for entry in report), report
