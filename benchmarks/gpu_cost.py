"""Cost of recording on a device: time and peak memory of a recorded step over a plain step.

The networks are those of `models.py`, in float32 with PyTorch's defaults (TF32 in convolutions
only), some also under autocast. Plain and recorded steps alternate within a round, in random order;
the ratio is the median over rounds. Peak memory is the most that PyTorch's allocator held in three
steps without a proof, parameters included. The compiled plain step (`torch.compile`) is last.
"""

import random
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from gpu_report import NEEDS_CUDA, Report, one_line, seconds
from models import CASES, Contender, language

ROUNDS, STEPS = 15, 5
"""Rounds, and steps per turn; arbitrary, as many as the time limit allows."""

SECONDS_A_TURN = 0.5
"""Longest turn (arbitrary)."""

ON_GPU = "GPT-2 small, 8 x 256 tokens"
"""Eight sequences: two, as on a CPU, are too few for a GPU."""
CASES[ON_GPU] = (partial(language, 8), torch.optim.SGD, 8)

NETWORKS = (
    "mlp, 784 inputs, SGD",
    "mlp, 3,072 inputs, SGD",
    "mlp, 784 inputs",
    "mlp, 3,072 inputs",
    "mlp, 784, in a study",
    "resnet18, 32 x 32",
    "lstm, 28 rows",
    "gru, 28 rows",
    "transformer, 28 rows",
    ON_GPU,
)
AUTOCAST = ("mlp, 784 inputs, SGD", "resnet18, 32 x 32", "transformer, 28 rows", ON_GPU)
"""Networks that are also measured under autocast."""
COMPILED = ("mlp, 784 inputs, SGD", "transformer, 28 rows", ON_GPU)
"""Networks whose plain step is compiled; compiling more takes too long."""


def autocast(device: str, dtype: torch.dtype | None) -> Any:
    """Return a context of mixed precision, or an empty one."""
    return torch.autocast(device, dtype) if dtype else nullcontext()


def make(name: str, records: bool, device: str, dtype: torch.dtype | None) -> Callable[[], None]:
    """Return the training step of a network on a device, after two steps of warm-up."""
    contender = Contender(name, records, device)

    def step() -> None:
        with autocast(device, dtype):
            contender.step()

    for _ in range(2):  # both need a proof where a parameter starts at zero
        step()
    return step


def peak(make_step: Callable[[], Callable[[], None]]) -> tuple[Callable[[], None], int]:
    """Return a step, and its peak of allocated bytes on the GPU."""
    before = torch.cuda.memory_allocated()
    step = make_step()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    return step, torch.cuda.max_memory_allocated() - before


def take_turns(
    steps: dict[str, Callable[[], None]], device: str, rounds: int, most: int = STEPS
) -> dict[str, list[float]]:
    """Return the seconds per step and round of contenders that alternate in random order.

    A turn has at most `most` steps, fewer where it would last longer than `SECONDS_A_TURN`.
    """
    first = max(seconds(device, step) for step in steps.values())
    count = max(1, min(most, int(SECONDS_A_TURN / first)))
    times: dict[str, list[float]] = {name: [] for name in steps}
    names, chance = list(steps), random.Random(1)

    def turn(step: Callable[[], None]) -> None:
        for _ in range(count):
            step()

    for _ in range(rounds):
        chance.shuffle(names)
        for name in names:
            times[name].append(seconds(device, partial(turn, steps[name])) / count)
    return times


def ratio(times: dict[str, list[float]], name: str) -> tuple[str, str]:
    """Return the median over rounds of the ratio to the plain step, and its quartiles."""
    pairs = zip(times[name], times["plain"], strict=True)
    ratios = [duration / plain for duration, plain in pairs]
    lower, middle, upper = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"{middle:.2f}", f"{lower:.2f} to {upper:.2f}"


def measure(name: str, device: str, dtype: torch.dtype | None, rounds: int) -> tuple[str, ...]:
    """Return the cells of a network's row."""
    steps: dict[str, Callable[[], None]] = {}
    peaks: list[int] = []
    for label, records in (("plain", False), ("recorded", True)):
        make_step = partial(make, name, records, device, dtype)
        if device == "cpu":
            steps[label] = make_step()
        else:
            steps[label], most = peak(make_step)
            peaks.append(most)
    times = take_turns(steps, device, rounds)
    milliseconds = f"{1e3 * statistics.median(times['plain']):.2f}"
    memory = (f"{peaks[0] / 2**20:.0f}", f"{peaks[1] / peaks[0]:.2f}") if peaks else ()
    return milliseconds, *ratio(times, "recorded"), *(memory or (NEEDS_CUDA, NEEDS_CUDA))


def measure_compiled(name: str, device: str, rounds: int) -> tuple[str, ...]:
    """Return the cells of the row for a compiled plain step, over the plain step."""
    plain = make(name, False, device, None)
    compiled = torch.compile(Contender(name, False, device).step)
    for _ in range(3):
        compiled()
    times = take_turns({"plain": plain, "compiled": compiled}, device, rounds)
    return f"{1e3 * statistics.median(times['plain']):.2f}", *ratio(times, "compiled")


def run(device: Literal["cpu", "cuda"], quick: bool, directory: Path) -> bool:
    """Measure all networks; `quick` takes two, in few rounds."""
    report = Report(
        directory / "cost.md",
        f"A recorded step over a plain one on {device}",
        (
            *("network", "optimizer", "precision", "plain, ms", "times plain", "middle half"),
            *("peak, MiB", "times plain's"),
        ),
        device,
    )
    rounds = 3 if quick else ROUNDS
    ratios = []

    def add_row(name: str, precision: str, function: Callable[[], tuple[str, ...]]) -> None:
        labels = (name, CASES[name][1].__name__, precision)
        try:
            cells = function()
        except Exception as error:  # of any kind: the other networks are measured
            cells = (one_line(error),)
        else:
            ratios.append(f"{name}, {precision}: {cells[1]}")
        report.row(*labels, *cells)
        if device == "cuda":
            torch.cuda.empty_cache()

    for precision, dtype, names in (
        ("float32", None, NETWORKS),
        ("bfloat16 autocast", torch.bfloat16, AUTOCAST),
    ):
        for name in names[:1] if quick else names:
            add_row(name, precision, partial(measure, name, device, dtype, rounds))
    report.summarise(f"recorded over plain: {'; '.join(ratios)}")
    for name in COMPILED:
        compiled = "plain, torch.compile"
        if device == "cuda":
            add_row(name, compiled, partial(measure_compiled, name, device, rounds))
        else:
            report.row(name, CASES[name][1].__name__, compiled, NEEDS_CUDA)
    return True
