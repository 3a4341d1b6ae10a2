"""Cost of the reverse pass: time in trainings and in plain steps, memory, other networks.

A *training* is that of a study: recorded, with the evaluation and the stored parameters of each
epoch. A *plain step* is torch's own: forward, backward, `optimizer.step()`. The contenders
alternate in rounds, since a machine's speed drifts; the result is the median over rounds of the
ratio. A reverse pass includes its replay. The peak of memory is that of a process of its own, which
trains and then goes backward, minus that of one that trains.

Map: `cost` (the section); `peak_of`; `python influence_cost.py TARGETS` measures in this process.
"""

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from influence_jobs import Setting, StoredRun, load_data, named_targets
from influence_scores import PAPER, Sizes
from influence_table import Bench, Row
from torch import Tensor
from torch.nn import functional

from sampimp.influence.any_network import NetworkDerivatives
from sampimp.influence.reverse_pass import ReversePass
from sampimp.influence.twice_differentiable import twice_differentiable
from sampimp.training.loop import TrainingRun
from sampimp.training.models import build_mlp, build_model
from sampimp.training.steps import make_optimizer

TARGETS = (1, 8, 16)
ASKED = {1: 3.2, 8: 1.8, 16: 1.8}


def seconds(function: Callable[[], object]) -> float:
    """Return the duration of a call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def train(setting: Setting) -> StoredRun:
    """Train and record a run as a study does."""
    data, schedule = load_data(setting)
    records = list(TrainingRun(setting.config, data, schedule).records())
    return StoredRun(
        setting=setting,
        parameters=np.stack([record.arrays["parameters"] for record in records]),
        tau=np.zeros(len(data.train_labels)),
        nll=records[-1].arrays["nll"],
        test_error=float(records[-1].arrays["test_error"]),
    )


def plain_training(setting: Setting) -> None:
    """Take the same steps by autograd, without recording or evaluation."""
    data, schedule = load_data(setting)
    training = setting.config.training
    inputs, labels = torch.from_numpy(data.train_inputs), torch.from_numpy(data.train_labels)
    model = build_mlp(inputs[0].shape, training.hidden, 10, 1, training.activation)
    optimizer = make_optimizer(model, training)
    for epoch in range(1, setting.epochs + 1):
        for batch in schedule(epoch):
            rows = torch.from_numpy(batch)
            optimizer.zero_grad()
            functional.cross_entropy(model(inputs[rows]), labels[rows]).backward()
            optimizer.step()


def go_back(run: StoredRun, count: int) -> None:
    """Go backward through a run for the mean and the first test samples."""
    specs = ("mean",) if count == 1 else ("mean", f"sample:0..{count - 2}")
    for _ in ReversePass(run.replay(), named_targets(run, specs)).epochs():
        pass


def cost_rows(setting: Setting, rounds: int) -> list[Row]:
    """Return the rows of time of one setting."""
    torch.set_num_threads(1)
    run = train(setting)
    contenders: dict[str, Callable[[], object]] = {
        "training": partial(train, setting),
        "plain": partial(plain_training, setting),
    }
    contenders |= {f"{count}": partial(go_back, run, count) for count in TARGETS}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, function in contenders.items():
            times[name].append(seconds(function))
    rows = []
    for count in TARGETS:
        pairs = zip(times[f"{count}"], times["training"], times["plain"], strict=True)
        ratios = [(back / count / whole, back / count / plain) for back, whole, plain in pairs]
        trainings, plain_steps = zip(*ratios, strict=True)
        rows.append(
            Row(
                check=f"cost of each of {count} targets, in trainings",
                setting=setting.words,
                value=statistics.median(trainings),
                low=min(trainings),
                high=max(trainings),
                asked=ASKED[count],
                at_most=True,
                note=f"{statistics.median(plain_steps):.2f} plain trainings without recording and "
                f"evaluation; least and most of {rounds} rounds",
                seconds=sum(times[f"{count}"]),
            )
        )
    return rows


def network_row(name: str, dataset: str, rounds: int, steps: int) -> Row:
    """Return the row of one of the study's networks, whose step is differentiated by autograd."""
    torch.set_num_threads(1)
    data, _ = load_data(Setting(dataset=dataset, samples=100 * steps))
    inputs, labels = torch.from_numpy(data.train_inputs), torch.from_numpy(data.train_labels)
    model = build_model(name, inputs[0].shape, (), 10, 1, "relu")
    optimizer = make_optimizer(model, replace(PAPER.config.training, model=name))

    def losses(batch: tuple[Tensor, Tensor]) -> Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    derivatives = NetworkDerivatives(model, losses)
    batches = list(zip(inputs.split(100), labels.split(100), strict=True))
    directions = [torch.randn(1, *parameter.shape) for parameter in model.parameters()]
    weights = torch.full((100,), 0.01)

    def plain() -> None:
        for batch in batches:
            optimizer.zero_grad()
            losses(batch).mean().backward()
            optimizer.step()

    def back() -> None:
        for batch in batches:
            step = derivatives.at([batch], [weights])
            step.gradients()
            step.products(directions, [torch.zeros_like(value) for value in directions])

    def bare() -> None:
        parameters = list(model.parameters())
        own = [direction[0] for direction in directions]
        with twice_differentiable(model):
            for batch in batches:
                mean = losses(batch).mean()
                gradients = torch.autograd.grad(mean, parameters, create_graph=True)
                torch.autograd.grad(gradients, parameters, own, allow_unused=True)

    back()  # the first step has checks of its own
    times = [(seconds(plain), seconds(back), seconds(bare)) for _ in range(rounds)]
    ratios = [1 + derivative / step for step, derivative, _ in times]  # 1: the replay
    least = statistics.median(1 + double / step for step, _, double in times)
    return Row(
        check=f"{name}: a step of the reverse pass, one target, in plain steps",
        setting=f"{dataset}, batches of 100, sgd; replay and derivatives",
        value=statistics.median(ratios),
        low=min(ratios),
        high=max(ratios),
        asked=3.5,
        at_most=True,
        note=f"PyTorch's double backward alone, without layers, samples and checks: {least:.2f}; a "
        f"plain step takes {1e3 * statistics.median(p for p, *_ in times) / steps:.1f} ms; least "
        f"and most of {rounds} rounds",
    )


def peak_of(samples: int, targets: int) -> float:
    """Return the peak resident memory in GB of a process that trains and goes backward."""
    command = [sys.executable, __file__, str(samples), str(targets)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)


def memory_row(sizes: Sizes) -> Row:
    """Return the row of memory beyond training, with 16 targets."""
    samples = sizes.memory_samples
    assert samples is not None
    training, reverse = (peak_of(samples, targets) for targets in (0, 16))
    return Row(
        check="peak memory beyond training in GB, 16 targets",
        setting=f"mnist, {samples:,} images, 512-512-512, one epoch, sgd",
        value=reverse - training,
        asked=1.0,
        at_most=True,
        note=f"{reverse:.2f} against {training:.2f} GB of the process, the data included",
    )


def cost(bench: Bench, sizes: Sizes) -> list[Row]:
    """Time and memory; run it on a machine that does nothing else."""
    # In a run of one epoch, the gradients of a target over 10,000 test images are a third of it.
    setting = replace(sizes.paper, epochs=min(3, sizes.paper.epochs))
    rows = cost_rows(setting, sizes.rounds)
    rows += [
        network_row(name, setting.dataset, sizes.rounds, sizes.network_steps)
        for name in sizes.networks
    ]
    return [*rows, memory_row(sizes)] if sizes.memory_samples else rows


if __name__ == "__main__":
    samples, targets = map(int, sys.argv[1:])
    torch.set_num_threads(1)
    run = train(Setting(activation="relu", width=512, epochs=1, samples=samples))
    if targets:
        go_back(run, targets)
    # Linux counts in KiB.
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9)
