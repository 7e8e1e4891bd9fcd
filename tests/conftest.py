"""Test-wide settings: one thread, and where the optional real data lives."""

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # tiny tensors: a second thread only waits

DATA_ROOT = Path(os.environ.get("SEED_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture
def real_data():
    """Return a function that gives the path of a real data set, or skips the test where it is absent."""

    def find(name: str) -> Path:
        path = DATA_ROOT / name
        if not path.exists():
            pytest.skip(f"real data {name} is not at {path}; set SEED_DATA to the folder that holds it")
        return path

    return find
