"""Kill training processes with SIGKILL at random moments until a run ends, again and again; print what came out.

    python tests/graphrec/kill_driver.py FOLDER ROUNDS SEED MODEL

One process imports torch and forks a child per attempt, so that an attempt costs a fraction of a second. A child runs
the real command line. Moments are drawn: after a random time, or at a random call of something inside a step, a save
or an evaluation. The last line is JSON: per round the number of kills, whether anything differs from the run that was
never killed, and where the kills landed.
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

import apps.clcrec.demo
import apps.graphrec.demo
import apps.graphrec.evaluate
import apps.graphrec.main
import apps.graphrec.spectral
import apps.graphrec.train
import shared.negatives
from shared.checkpoint import load_checkpoint

FLAGS = (
    "--epochs 4 --batch-size 64 --embed-dim 8 --hidden-dim 8 --layers 2 --filter-rank 8 --num-negatives 8 "
    "--save-every 4 --log-every 3 --norm-every 2 --lr 0.01"
)
MODELS = {  # what decides what is drawn, and what a step is made of
    "lightgcn": "--ema-decay 0.9 --init spectral",
    "xsimgcl": "--model xsimgcl --loss bpr --propagate-every 2 --batch-size 32",
    "clcrec-graph": "--model clcrec-graph --accumulate 2",
    "bspm": "--model bspm",
}
STEPS = {  # where a child of a model that trains kills itself: (module, function)
    "step": (apps.graphrec.train, "amp_step"),
    "SIGTERM in a step": (apps.graphrec.train, "amp_step"),  # which saves, and so moves the places of later kills
    "negatives": (shared.negatives, "permutations"),
    "evaluation": (apps.graphrec.evaluate, "top_k"),
}
EVERYWHERE: dict[str, tuple[Any, str]] = {
    "fit of a filter": (apps.graphrec.spectral, "product"),
    "scores of a filter": (apps.graphrec.evaluate, "largest"),
    "before fsync": (os, "fsync"),
    "before replace": (os, "replace"),
    "after a save": (apps.graphrec.train, "save_step"),
}
PLACES = STEPS | EVERYWHERE


def write_data(folder: Path, model: str) -> None:
    """A small folder that the model can be trained on."""
    if model == "clcrec-graph":
        made: Any = apps.clcrec.demo.demo_data(num_users=40, num_warm=30, num_cold=10)
        with mock.patch.object(apps.clcrec.demo, "demo_data", return_value=made):
            apps.clcrec.demo.write_demo(folder)
    else:
        made = apps.graphrec.demo.demo_data(num_users=60, num_items=60)
        with mock.patch.object(apps.graphrec.demo, "demo_data", return_value=made):
            apps.graphrec.demo.write_demo(folder)


def warm_up() -> None:
    """Load what the first optimizer step loads, which is a lot, once instead of in every child."""
    weight = torch.nn.Parameter(torch.zeros(1))
    weight.grad = torch.zeros(1)
    torch.optim.Adam([weight]).step()


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
            apps.graphrec.main.app(words)
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
    files = sorted((run_dir / "checkpoints").glob("*.safetensors"))
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    result = json.loads((run_dir / "result.json").read_text(encoding="utf-8"))
    return {
        "weights": {path.name: load_checkpoint(path) for path in {files[0], files[-1]}},
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
    (run_dir,) = [path for path in (folder / "graphrec").iterdir() if (path / "config.yaml").is_file()]
    return run_dir


def main(folder: Path, rounds: int, seed: int, model: str) -> None:
    """Print one JSON line."""
    draw = random.Random(seed)
    data = folder / "shop"
    write_data(data, model)
    start = ["train", "--data-path", str(data), *FLAGS.split(), *MODELS[model].split(), "--runs-dir"]
    places = list(EVERYWHERE if model == "bspm" else PLACES)
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
                    planted = (place, draw.randint(1, 12 if place.endswith("step") else 6), draw.random() < 0.5)
            status = attempt(words, planted, delay_s)
            if os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 128 + signal.SIGTERM:
                moments.append(planted[0] if planted else f"{delay_s:.2f} s")
            else:
                assert status == 0, (status, words, moments)
                break
            begun = [path for path in runs.glob("graphrec/*") if (path / "config.yaml").is_file()]
            words = ["train", "--resume", str(begun[0])] if begun else words
        report.append({"kills": moments, "identical": equal(outcome(only(runs)), expected)})
    print(json.dumps({"rounds": report}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    warm_up()
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
