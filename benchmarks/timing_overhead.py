"""What the timing hooks of a step cost: off, on, and watched, in microseconds of the host a step.

    python -m benchmarks.timing_overhead

A step here is nothing but its marks, those of one step of an app. "off" is what a loop pays that is given no timer that
counts: a recorder in the steps that it leaves out. The ways take turns; the figure is the median of the rounds.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from shared.device import describe_machine, pick_device
from shared.timing import StepRecorder, StepTimer
from shared.watch import profiler_ranges

MARKS = ("data_wait", "copy", "forward", "backward", "optimizer")


def run_steps(timer: StepTimer, steps: int) -> float:
    """Seconds a step, of steps that do nothing but say where they are."""
    begin = time.perf_counter()
    for _ in range(steps):
        timer.start()
        for name in MARKS:
            timer.mark(name)
        timer.finish()
    elapsed_s = time.perf_counter() - begin
    timer.summary()
    return elapsed_s / steps


def main() -> None:
    """Print one line for each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=1000, help="steps a round")
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args()

    device = pick_device(options.device)
    ways: dict[str, Callable[[], StepTimer]] = {
        "off": lambda: StepRecorder(device, every=1 << 60),
        "StepTimer, as `train` has it": lambda: StepTimer(device),
        "StepTimer with ranges, as a trace has it": lambda: StepTimer(device, watch=profiler_ranges()),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, make in ways.items():
            timer = make()
            if name == "off":  # the first step is the one it takes
                run_steps(timer, 1)
            seconds[name].append(run_steps(timer, options.steps))
    print(f"{device}: " + ", ".join(f"{key} {value}" for key, value in describe_machine().items()))
    for name, found in seconds.items():
        low, high = min(found), max(found)
        print(f"{name:42s} {1e6 * statistics.median(found):8.2f} us a step ({1e6 * low:.2f} .. {1e6 * high:.2f})")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
