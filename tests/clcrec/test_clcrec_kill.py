"""A run killed with SIGKILL at any moment and resumed ends bit for bit like one that was never killed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its children")
@pytest.mark.parametrize("negatives", ["device", "pool"])
def test_killed_runs_end_bit_for_bit_like_a_whole_one(negatives, tmp_path):
    found = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("kill_driver.py")), str(tmp_path), "3", "7", negatives],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    rounds = json.loads(found.stdout.splitlines()[-1])["rounds"]
    assert len(rounds) == 3
    assert sum(len(entry["kills"]) for entry in rounds) >= 3
    assert all(entry["identical"] for entry in rounds), rounds
