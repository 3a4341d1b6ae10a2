"""Cost of recording: one training step of the paper's network, with five contenders.

The step is the paper's (section 3.1): three layers of 512 ReLU units, batch 100, SGD at rate 0.1
with weight decay 1e-5, mean cross-entropy; data in memory. Every contender makes the same update;
all but the first also compute the importance of each sample in each layer. These values are
compared before the timing.

The machine's speed drifts by more than the measured difference. The contenders therefore alternate
within a round, in random order, and the result is the median over rounds of the ratio to the plain
step of the same round.

When changing the recorder, watch the page faults as well. Small tensors that outlive a step
fragment the block that a gradient of several megabytes left free, so that the next gradient takes
fresh pages; at 3,072 inputs this alone moved the ratio between 1.04 and 1.16 from run to run. The
other tools write to a preallocated table, which is their best case.

Map: the contenders are `Plain`, `Sampimp` (the recorder), `Study` (the step of a trial), `BackPack`
and `OpacusGhost`; then `check_agreement`, `measure`, `main` (`python benchmarks/step.py --help`).
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import random
import statistics
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from sampimp.importance.recorder import ImportanceRecorder
from sampimp.importance.sample_index import sum_by_sample
from sampimp.training.fused import FusedStep
from sampimp.training.models import build_mlp

HIDDEN, CLASSES, BATCH_SIZE = (512, 512, 512), 10, 100  # section 3.1
LEARNING_RATE, WEIGHT_DECAY = 0.1, 1e-5  # section 3.1
BATCHES = 100  # arbitrary: enough that no batch is still in the cache when its turn comes again


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the benchmark."""

    inputs: tuple[int, ...] = (784, 3072)
    """Inputs of the network: 784 as in MNIST, 3,072 as in CIFAR-10."""
    rounds: int = 300
    """Rounds for each number of inputs; in each round every contender takes one turn."""
    steps: int = 5
    """Training steps in a turn."""
    threads: int = 1
    """CPU threads; by default one, so that nothing dilutes the difference."""
    seed: int = 1
    """Seed of the initialisation, the data and the order within rounds."""
    out: Path | None = None
    """Also write the result to this file: a table (.md) or all numbers (.json)."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One contender on one number of inputs."""

    inputs: int
    name: str
    milliseconds: float
    """Median time of a step."""
    ratio: float
    """Median over rounds of the time relative to the plain step of the same round."""
    lower: float
    upper: float
    """The quartiles of that ratio."""
    rounds: int


class Contender(Protocol):
    """One way to make a training step."""

    model: nn.Module

    def step(self, inputs: Tensor, labels: Tensor, index: Tensor, epoch: int) -> None:
        """Train on one batch."""


class Plain:
    """PyTorch alone."""

    def __init__(self, inputs: int, seed: int) -> None:
        self.model: nn.Module = build_mlp((inputs,), HIDDEN, CLASSES, seed)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY
        )
        self.loss = nn.CrossEntropyLoss()

    def step(self, inputs: Tensor, labels: Tensor, index: Tensor, epoch: int) -> None:
        """Train on one batch."""
        self.optimizer.zero_grad()
        self.loss(self.model(inputs), labels).backward()
        self.optimizer.step()


class Sampimp(Plain):
    """With this project's recorder around the unchanged step."""

    def __init__(self, inputs: int, seed: int) -> None:
        super().__init__(inputs, seed)
        self.recorder = ImportanceRecorder(self.model, self.optimizer)

    def step(self, inputs: Tensor, labels: Tensor, index: Tensor, epoch: int) -> None:
        """Train on one batch and record it."""
        with self.recorder.step(index, epoch=epoch):
            super().step(inputs, labels, index, epoch)

    def importance(self, index: Tensor) -> Tensor:
        """Return the recorded importance of samples in the first epoch, shape (layer, N)."""
        return torch.from_numpy(self.recorder.to_dataset().importance.values[0])[:, index]


class Study(Plain):
    """The step of a study's trials, written out for stacks of linear layers, recording included."""

    def __init__(self, inputs: int, seed: int) -> None:
        super().__init__(inputs, seed)
        assert isinstance(self.model, nn.Sequential)
        optimizer = torch.optim.SGD(
            self.model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True
        )
        self.fused = FusedStep(self.model, optimizer, record=True)
        self.indices: list[Tensor] = []
        self.epoch = 1
        self.table = torch.full((len(HIDDEN) + 1, BATCHES * BATCH_SIZE), torch.nan)

    def step(self, inputs: Tensor, labels: Tensor, index: Tensor, epoch: int) -> None:
        """Train on one batch and record it."""
        if epoch != self.epoch:
            self.take()
            self.epoch = epoch
        self.fused(inputs, labels)
        self.indices.append(index)

    def take(self) -> None:
        """Store the importance of the epoch so far, by sample."""
        beta_LN = self.fused.take()
        assert beta_LN is not None
        self.table = sum_by_sample(torch.cat(self.indices), beta_LN, self.table.shape[1])
        self.indices = []

    def importance(self, index: Tensor) -> Tensor:
        """Return the latest importance of samples, shape (layer, N)."""
        self.take()
        return self.table[:, index]


class BackPack(Plain):
    """With BackPACK's squared norms of the samples' gradients (`BatchL2Grad`).

    They are the squared norms of the mean loss's gradients, so importance is rate^2 times them.
    """

    def __init__(self, inputs: int, seed: int) -> None:
        import backpack
        from backpack.extensions import BatchL2Grad

        super().__init__(inputs, seed)
        self.model = backpack.extend(self.model)
        self.loss = backpack.extend(self.loss)
        self.backpack, self.extension = backpack.backpack, BatchL2Grad
        self.layers: list[Any] = [m for m in self.model.modules() if isinstance(m, nn.Linear)]
        self.table = torch.full((len(self.layers), BATCHES * BATCH_SIZE), torch.nan)

    def step(self, inputs: Tensor, labels: Tensor, index: Tensor, epoch: int) -> None:
        """Train on one batch and keep its norms."""
        self.optimizer.zero_grad()
        loss = self.loss(self.model(inputs), labels)
        with self.backpack(self.extension()):
            loss.backward()
        norms = [layer.weight.batch_l2 + layer.bias.batch_l2 for layer in self.layers]
        self.table[:, index] = LEARNING_RATE**2 * torch.stack(norms)
        self.optimizer.step()

    def importance(self, index: Tensor) -> Tensor:
        """Return the latest importance of samples, shape (layer, N)."""
        return self.table[:, index]


class OpacusGhost(Plain):
    """With Opacus's ghost norms.

    Only the pass that computes the norms is timed: the ordinary backward pass with Opacus's hooks,
    then the ordinary update. Private training would add a second backward pass over the clipped
    losses, and noise; importance needs neither, and they would about double the time. The norms are
    those of the gradients of single losses, so importance is (rate / B)^2 norm^2.
    """

    def __init__(self, inputs: int, seed: int) -> None:
        from opacus.grad_sample import GradSampleModuleFastGradientClipping

        super().__init__(inputs, seed)
        self.layers: list[Any] = [m for m in self.model.modules() if isinstance(m, nn.Linear)]
        self.model = GradSampleModuleFastGradientClipping(
            self.model, max_grad_norm=1, use_ghost_clipping=True, loss_reduction="mean"
        )
        self.table = torch.full((len(self.layers), BATCHES * BATCH_SIZE), torch.nan)

    def step(self, inputs: Tensor, labels: Tensor, index: Tensor, epoch: int) -> None:
        """Train on one batch and keep its norms."""
        self.optimizer.zero_grad()
        self.loss(self.model(inputs), labels).backward()
        norms = [
            layer.weight._norm_sample.square() + layer.bias._norm_sample.square()
            for layer in self.layers
        ]
        scale = (LEARNING_RATE / len(labels)) ** 2
        self.table[:, index] = scale * torch.stack(norms)
        self.optimizer.step()

    def importance(self, index: Tensor) -> Tensor:
        """Return the latest importance of samples, shape (layer, N)."""
        return self.table[:, index]


CONTENDERS: dict[str, tuple[type[Plain], str]] = {
    "plain PyTorch": (Plain, "torch"),
    "sampimp study": (Study, "torch"),
    "sampimp recorder": (Sampimp, "torch"),
    "BackPACK BatchL2Grad": (BackPack, "backpack"),
    "Opacus ghost norms": (OpacusGhost, "opacus"),
}
"""Class of each contender, and the package that it requires."""


def available() -> dict[str, type[Plain]]:
    """Return the contenders whose package is installed."""
    return {
        name: kind
        for name, (kind, package) in CONTENDERS.items()
        if importlib.util.find_spec(package) is not None
    }


def make_batches(inputs: int, seed: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return random batches: inputs in [0, 1], labels, and the samples' indices."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(BATCHES * BATCH_SIZE, generator=generator)
    return [
        (
            torch.rand(BATCH_SIZE, inputs, generator=generator),
            torch.randint(0, CLASSES, (BATCH_SIZE,), generator=generator),
            index,
        )
        for index in order.split(BATCH_SIZE)
    ]


def check_agreement(
    contenders: Sequence[type[Plain]], batch: tuple[Tensor, Tensor, Tensor], seed: int
) -> None:
    """Raise RuntimeError unless all contenders agree on one step's parameters and importance."""
    inputs, labels, index = batch
    trained = [kind(inputs.shape[1], seed) for kind in contenders]
    for contender in trained:
        contender.step(inputs, labels, index, epoch=1)
    expected = [parameter.detach() for parameter in trained[0].model.parameters()]
    values: dict[str, Tensor] = {}
    for contender in trained:
        name = type(contender).__name__
        for left, right in zip(expected, contender.model.parameters(), strict=True):
            exact = isinstance(contender, Sampimp)  # recording leaves every bit as it is
            if not (torch.equal if exact else torch.allclose)(left, right.detach()):
                raise RuntimeError(f"the parameters of {name} differ from those of plain PyTorch")
        if isinstance(contender, Study | Sampimp | BackPack | OpacusGhost):
            values[name] = contender.importance(index)
    for name, beta in values.items():
        if not torch.allclose(beta, values["Sampimp"], rtol=1e-4, atol=0):
            raise RuntimeError(f"the importance by {name} differs from that by sampimp")


def measure(inputs: int, config: Config) -> list[Result]:
    """Time all contenders on a network with this many inputs."""
    kinds = available()
    batches = make_batches(inputs, config.seed)
    check_agreement(list(kinds.values()), batches[0], config.seed)
    contenders = {name: kind(inputs, config.seed) for name, kind in kinds.items()}
    names = list(contenders)
    shuffler = random.Random(config.seed)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    warm_up = 3  # arbitrary: the first steps allocate memory
    for number in range(-warm_up, config.rounds):
        first = (number + warm_up) * config.steps
        turn = [
            (*batches[k % BATCHES], k // BATCHES + 1) for k in range(first, first + config.steps)
        ]
        shuffler.shuffle(names)
        for name in names:
            step = contenders[name].step
            start = time.perf_counter_ns()
            for batch in turn:
                step(*batch)
            duration = time.perf_counter_ns() - start
            if number >= 0:
                seconds[name].append(duration / config.steps / 1e9)
    return [summarise(inputs, name, seconds[name], seconds["plain PyTorch"]) for name in contenders]


def summarise(inputs: int, name: str, seconds: list[float], plain: list[float]) -> Result:
    """Reduce the rounds of one contender to medians and quartiles."""
    ratios = [duration / base for duration, base in zip(seconds, plain, strict=True)]
    lower, middle, upper = statistics.quantiles(ratios, n=4, method="inclusive")
    return Result(
        inputs=inputs,
        name=name,
        milliseconds=1e3 * statistics.median(seconds),
        ratio=middle,
        lower=lower,
        upper=upper,
        rounds=len(ratios),
    )


def describe_machine() -> dict[str, str]:
    """Return versions, processor, threads and load."""
    names = {"sampimp", "torch", "backpack-for-pytorch", "opacus"}
    versions = {}
    for name in sorted(names):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
                break
    return {
        **versions,
        "python": platform.python_version(),
        "processor": f"{processor}, {os.cpu_count()} cores, threads {torch.get_num_threads()}",
        "load": f"{os.getloadavg()[0]:.1f} at the end",
    }


def cells(result: Result) -> tuple[str, ...]:
    """Return a row of the table."""
    spread = "" if result.name == "plain PyTorch" else f"{result.lower:.3f} to {result.upper:.3f}"
    return (
        f"{result.inputs:,}",
        result.name,
        f"{result.milliseconds:.2f}",
        f"{result.ratio:.3f}",
        spread,
    )


HEADINGS = ("inputs", "step", "ms", "times plain", "middle half")


def to_markdown(results: Sequence[Result], machine: dict[str, str]) -> str:
    """Return the table, machine and versions as Markdown."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---:|:---|---:|---:|---:|"]
    lines += ["| " + " | ".join(cells(result)) + " |" for result in results]
    lines += ["", f"Medians over {results[0].rounds} rounds. {note(machine)}", ""]
    return "\n".join(lines)


def note(machine: dict[str, str]) -> str:
    """Return the machine in one line."""
    return "; ".join(f"{key} {value}" for key, value in machine.items())


def write(path: Path, results: Sequence[Result], machine: dict[str, str]) -> None:
    """Write the result as JSON if the name ends in .json, else as Markdown."""
    payload: dict[str, Any] = {"machine": machine, "results": [asdict(row) for row in results]}
    text = (
        json.dumps(payload, indent=2) if path.suffix == ".json" else to_markdown(results, machine)
    )
    path.write_text(text)


def main(config: Config) -> list[Result]:
    """Run, print and return the benchmark."""
    console = Console()
    torch.set_num_threads(config.threads)
    # Opacus registers full backward hooks on a network whose inputs need no gradient: torch warns.
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    missing = sorted(set(CONTENDERS) - set(available()))
    if missing:
        console.print(f"Left out, not installed: {', '.join(missing)} (make bench installs them)")
    results: list[Result] = []
    for inputs in config.inputs:
        with console.status(f"{inputs:,} inputs, {config.rounds} rounds"):
            results += measure(inputs, config)
    table = Table(title=f"One training step of the paper's network, threads: {config.threads}")
    for number, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if number == 1 else "right", no_wrap=True)
    for result in results:
        table.add_row(*cells(result), end_section=result.name == list(available())[-1])
    console.print(table)
    machine = describe_machine()
    console.print(
        f"Medians and quartiles over {config.rounds} rounds of {config.steps} steps; "
        + note(machine)
    )
    if config.out is not None:
        write(config.out, results, machine)
    return results


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__.partition("\n")[0]))
