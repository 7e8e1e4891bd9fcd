"""Kill training processes with SIGKILL at random moments until a run ends, again and again; print what came out.

    python tests/reid/kill_driver.py FOLDER ROUNDS SEED WORKERS

One process imports torch and forks a child per attempt, so that an attempt costs a fraction of a second. A child runs
the real command line; with WORKERS above 0 it forks workers of its own, which must die with it. Moments are drawn:
after a random time, or at a random call of something inside a step, a save or an evaluation. The last line is JSON:
per round the number of kills, whether anything differs from the run that was never killed, and where the kills landed.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import apps.reid.clipping
import apps.reid.demo
import apps.reid.evaluate
import apps.reid.formats
import apps.reid.loaders
import apps.reid.main
import apps.reid.train
from shared.checkpoint import load_checkpoint

FLAGS = (
    "--modalities rgb,nir,text --epochs 3 --identities-per-batch 4 --num-instances 2 --epoch-length 5 --accumulate 2 "
    "--modality-dropout 0.2 --patch 8 --embed-dim 8 --tower-width 8 --tower-layers 1 --tower-heads 1 --text-width 8 "
    "--text-layers 1 --text-heads 1 --fusion-heads 1 --dropout 0.2 --max-tokens 12 --clip-window 4 --warmup-steps 2 "
    "--save-every 2 --log-every 2 --norm-every 2 --eval-every 1 --lr 0.01 --start-method fork --num-workers"
)
PLACES: dict[str, tuple[Any, str]] = {  # where a child kills itself: (module or class, function)
    "step": (apps.reid.train, "amp_step"),
    "SIGTERM in a step": (apps.reid.train, "amp_step"),  # which saves, and so moves the places of later kills
    "batch ahead": (apps.reid.loaders.Batches, "__getitem__"),  # in the thread
    "clipping": (apps.reid.clipping.AdaptiveClip, "largest_norm"),
    "evaluation": (apps.reid.evaluate, "with_means"),
    "before fsync": (os, "fsync"),
    "before replace": (os, "replace"),
    "after a save": (apps.reid.train, "save_step"),
}


def write_data(folder: Path) -> Path:
    """A pack of a few of the demo's people, small."""
    with mock.patch.multiple(apps.reid.demo, NUM_TRAIN=8, NUM_TEST=2):
        apps.reid.demo.write_demo(folder / "people")
    pack = folder / "people.safetensors"
    apps.reid.formats.prepare_source(folder / "people", pack, format="orbench", height=16, width=8, workers=1)
    return pack


def plant(place: str, call: int, *, after: bool) -> None:
    """Make this process kill itself at the given call of a function, before or after the call."""
    module, name = PLACES[place]
    original = getattr(module, name)
    number = signal.SIGTERM if place.startswith("SIGTERM") else signal.SIGKILL
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and not after:
            os.kill(os.getpid(), number)
        result = original(*args, **kwargs)
        if calls == call and after:
            os.kill(os.getpid(), number)
        return result

    setattr(module, name, counted)


def attempt(words: list[str], planted: tuple[str, int, bool] | None, delay_s: float | None) -> int:
    """Run the command line in a child; its wait status. Killed by the plant or after the delay, whichever there is."""
    child = os.fork()
    if child == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        code = 1
        try:
            if planted is not None:
                plant(planted[0], planted[1], after=planted[2])
            apps.reid.main.app(words)
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            os._exit(code)
    if delay_s is not None:
        time.sleep(delay_s)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def outcome(run_dir: Path) -> dict[str, Any]:
    """All that must not depend on kills: best and last checkpoint, leftovers, metrics, lines of metrics.jsonl."""
    best, *steps = sorted((run_dir / "checkpoints").glob("*.safetensors"))
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    result = json.loads((run_dir / "result.json").read_text(encoding="utf-8"))
    return {
        "weights": {path.name: load_checkpoint(path) for path in (best, steps[-1])},
        "leftovers": sorted(path.name for path in run_dir.rglob("*.tmp")),
        "metrics": result["metrics"],
        "table": result["table"],
        "lines": [
            {key: value for key, value in line.items() if not key.startswith("time") and not key.endswith("_per_s")}
            for line in lines
        ],
    }


def equal(a: Any, b: Any) -> bool:
    """Equality to the last bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def only(folder: Path) -> Path:
    """The single run folder below `folder`."""
    (run_dir,) = [path for path in (folder / "reid").iterdir() if (path / "config.yaml").is_file()]
    return run_dir


def main(folder: Path, rounds: int, seed: int, workers: str) -> None:
    """Print one JSON line."""
    draw = random.Random(seed)
    pack = write_data(folder)
    start = ["train", "--data-path", str(pack), *FLAGS.split(), workers, "--runs-dir"]
    places = [place for place in PLACES if workers == "0" or place != "batch ahead"]
    begin = time.perf_counter()
    status = attempt([*start, str(folder / "whole")], None, None)
    whole_s = time.perf_counter() - begin
    assert status == 0, status
    expected = outcome(only(folder / "whole"))
    report = []
    for index in range(rounds):
        runs = folder / f"round-{index}"
        moments: list[str] = []
        words = [*start, str(runs)]
        while True:
            planted, delay_s = None, None
            if len(moments) < 4:
                if draw.random() < 0.4:
                    delay_s = draw.uniform(0.0, whole_s)
                else:
                    place = draw.choice(places)
                    planted = (place, draw.randint(1, 12 if place.endswith("step") else 8), draw.random() < 0.5)
            status = attempt(words, planted, delay_s)
            if os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 128 + signal.SIGTERM:
                moments.append(planted[0] if planted else f"{delay_s:.2f} s")
            else:
                assert status == 0, (status, words, moments)
                break
            begun = [path for path in runs.glob("reid/*") if (path / "config.yaml").is_file()]
            words = ["train", "--resume", str(begun[0])] if begun else words
        report.append({"kills": moments, "identical": equal(outcome(only(runs)), expected)})
    print(json.dumps({"rounds": report}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
