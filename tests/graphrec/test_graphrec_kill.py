"""A run killed with SIGKILL at any moment and resumed ends bit for bit like one that was never killed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its children")
@pytest.mark.parametrize("model", ["lightgcn", "xsimgcl", "clcrec-graph", "bspm"])
def test_killed_runs_end_bit_for_bit_like_a_whole_one(model, tmp_path):
    found = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("kill_driver.py")), str(tmp_path), "2", "7", model],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    rounds = json.loads(found.stdout.splitlines()[-1])["rounds"]
    assert len(rounds) == 2
    assert sum(len(entry["kills"]) for entry in rounds) >= 2
    assert all(entry["identical"] for entry in rounds), rounds
