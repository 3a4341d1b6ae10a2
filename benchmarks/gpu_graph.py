"""The paper's step captured in a CUDA graph, recording included, against steps without a graph.

A replay runs no Python and uses the memory of the captured step: each batch is copied to the
graph's inputs, and its importance is copied out after the replay. Contenders alternate over batches
on the device. Parameters and importance of captured steps are compared with those of the same steps
without a graph. The recorder is made for loops in Python; capturing its step is the last attempt.

Map: `Trainer` (a network with its optimizer and a step), `Captured` (its step as a graph),
`compare` (results), `Race` (speed).
"""

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from gpu_cost import take_turns
from gpu_report import NEEDS_CUDA, Report, one_line
from torch import Tensor, nn
from torch.nn import functional

from sampimp.importance.recorder import ImportanceRecorder
from sampimp.training.fused import FusedStep
from sampimp.training.loop import use_deterministic_algorithms
from sampimp.training.models import build_mlp

BATCH_SIZE, LAYERS = 100, 4  # section 3.1
WARM_UP = 3
"""Steps before a capture, so that it contains no first allocation and no choice of kernels."""
COMPARED = 20
"""Steps whose results are compared; arbitrary."""

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": partial(torch.optim.SGD, lr=0.1, weight_decay=1e-5, fused=True),  # section 3.1
    "AdamW": partial(torch.optim.AdamW, lr=1e-3),
}


class Trainer:
    """The paper's network with one of three steps: plain, the recorder's, or a study's.

    Parameters
    ----------
    data
        Inputs (N, 784) and labels (N,), on the device.
    """

    def __init__(
        self, kind: str, optimizer: str, data: tuple[Tensor, Tensor], *, capturable: bool
    ) -> None:
        self.data = data
        model = build_mlp((784,), (512, 512, 512), 10, seed=1).to(data[0].device)
        options = {"capturable": True} if capturable and optimizer != "SGD" else {}
        self.model, self.optimizer = model, OPTIMIZERS[optimizer](model.parameters(), **options)
        self.table = torch.zeros(LAYERS, len(data[1]), device=data[0].device)
        self._recorder: ImportanceRecorder | None = None
        self._fused: FusedStep | None = None
        if kind == "recorder":
            self._recorder = ImportanceRecorder(model, self.optimizer)
        elif kind == "study":
            self._fused = FusedStep(model, self.optimizer, record=True)
        self._count = 0

    @property
    def batches(self) -> int:
        """Number of batches in the data."""
        return len(self.data[1]) // BATCH_SIZE

    def step_on(self, inputs: Tensor, labels: Tensor) -> Tensor | None:
        """Train on a batch; return beta (layer, sample) if the step is a study's."""
        if self._fused:
            self._fused(inputs, labels)
            return self._fused.latest()
        if self._recorder is None:
            self._train(inputs, labels)
            return None
        with self._recorder.step(range(len(labels)), epoch=1):
            self._train(inputs, labels)
        return None

    def step(self) -> None:
        """Train on the next batch, and store its importance by sample."""
        batch = self.next_samples()
        beta_LN = self.step_on(self.data[0][batch], self.data[1][batch])
        if beta_LN is not None:
            self.table[:, batch] = beta_LN

    def next_samples(self) -> slice:
        """Return the samples of the next batch."""
        start = BATCH_SIZE * (self._count % self.batches)
        self._count += 1
        return slice(start, start + BATCH_SIZE)

    def forget(self) -> None:
        """Discard the importance recorded so far."""
        if self._fused:
            self._fused.take()
        if self._recorder:
            self._recorder.pop_epoch(1, BATCH_SIZE)

    def _train(self, inputs: Tensor, labels: Tensor) -> None:
        self.optimizer.zero_grad()
        functional.cross_entropy(self.model(inputs).double(), labels).backward()
        self.optimizer.step()


class Captured:
    """The step of a trainer as a CUDA graph, starting from its current parameters."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        inputs, labels = trainer.data
        self._inputs = inputs[:BATCH_SIZE].clone()
        self._labels = labels[:BATCH_SIZE].clone()
        before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                trainer.step_on(self._inputs, self._labels)
        torch.cuda.current_stream().wait_stream(stream)
        trainer.forget()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._beta_LN = trainer.step_on(self._inputs, self._labels)
        with torch.no_grad():  # in place: the graph uses these tensors
            for parameter, value in zip(trainer.model.parameters(), before, strict=True):
                parameter.copy_(value)
            for state in trainer.optimizer.state.values():
                for value in state.values():
                    if isinstance(value, Tensor):
                        value.zero_()

    def step(self) -> None:
        """Train on the next batch, and store its importance by sample."""
        batch = self._trainer.next_samples()
        self._inputs.copy_(self._trainer.data[0][batch])
        self._labels.copy_(self._trainer.data[1][batch])
        self._graph.replay()
        if self._beta_LN is not None:
            self._trainer.table[:, batch] = self._beta_LN


def make_data(device: str, batches: int) -> tuple[Tensor, Tensor]:
    """Return random samples, the same on each device."""
    generator = torch.Generator().manual_seed(1)
    count = batches * BATCH_SIZE
    inputs = torch.rand(count, 784, generator=generator)
    labels = torch.randint(0, 10, (count,), generator=generator)
    return inputs.to(device), labels.to(device)


def compare(optimizer: str, data: tuple[Tensor, Tensor]) -> str:
    """Return the difference between captured recorded steps and the same steps without a graph."""
    trainers = [Trainer("study", optimizer, data, capturable=True) for _ in range(2)]
    captured = Captured(trainers[1])
    for _ in range(COMPARED):
        trainers[0].step()
        captured.step()
    parameters = [nn.utils.parameters_to_vector(trainer.model.parameters()) for trainer in trainers]
    words = []
    for what, (left, right) in (
        ("parameters", parameters),
        ("importance", [trainer.table for trainer in trainers]),
    ):
        error = float((left - right).detach().abs().max() / left.detach().abs().max())
        words.append(f"{what} {'equal' if torch.equal(left, right) else f'apart by {error:.1e}'}")
    return ", ".join(words)


def without_graph(kind: str, optimizer: str, data: tuple[Tensor, Tensor]) -> Callable[[], None]:
    """Return a step that runs in Python, after one step of warm-up."""
    step = Trainer(kind, optimizer, data, capturable=False).step
    step()
    return step


def with_graph(kind: str, optimizer: str, data: tuple[Tensor, Tensor]) -> Callable[[], None]:
    """Return a step that replays a graph."""
    return Captured(Trainer(kind, optimizer, data, capturable=True)).step


class Race:
    """Measures steps beside the plain step, and reports their rates."""

    def __init__(
        self, report: Report, device: str, quick: bool, data: tuple[Tensor, Tensor]
    ) -> None:
        self._report, self._device, self._quick, self._data = report, device, quick, data

    def run(self, optimizer: str, kinds: Sequence[str], graph: bool) -> None:
        """Measure steps of the given kinds, with or without a graph."""
        suffix = ", graph" if graph else ""
        if graph and self._device == "cpu":
            for kind in kinds:
                self._report.row(optimizer, kind + suffix, NEEDS_CUDA)
            return
        steps = {"plain": without_graph("plain", optimizer, self._data)}
        for kind in kinds:
            try:
                make = with_graph if graph else without_graph
                steps[kind + suffix] = make(kind, optimizer, self._data)
            except Exception as error:  # of any kind: the row names the reason
                self._report.row(optimizer, kind + suffix, one_line(error))
        rounds, most = (3, 2) if self._quick else (15, 50)  # arbitrary
        durations = take_turns(steps, self._device, rounds, most)
        medians = {name: statistics.median(times) for name, times in durations.items()}
        for name, median in medians.items():
            rate, ratio = f"{1 / median:,.0f}", f"{median / medians['plain']:.2f}"
            self._report.row(optimizer, name, rate, ratio)
        rates = "; ".join(f"{name} {1 / median:,.0f}" for name, median in medians.items())
        self._report.summarise(f"{optimizer}, steps a second: {rates}")


def run(device: Literal["cpu", "cuda"], quick: bool, directory: Path) -> bool:
    """Measure the steps under both optimizers; on a CPU only those without a graph."""
    use_deterministic_algorithms()  # sets a variable that cuBLAS reads at its first use
    torch.use_deterministic_algorithms(False)
    report = Report(
        directory / "graph.md",
        f"The paper's step on {device}, in steps a second",
        ("optimizer", "step", "steps a second", "times plain"),
        device,
    )
    data = make_data(device, 5 if quick else 100)
    race = Race(report, device, quick, data)
    for optimizer in OPTIMIZERS:
        race.run(optimizer, ("recorder", "study"), graph=False)
        race.run(optimizer, ("plain", "study"), graph=True)
    torch.use_deterministic_algorithms(True)
    for optimizer in OPTIMIZERS:
        try:
            outcome = compare(optimizer, data) if device == "cuda" else NEEDS_CUDA
        except Exception as error:  # of any kind: the other optimizer is compared
            outcome = one_line(error)
        report.row(optimizer, "study, graph and not", outcome)
    torch.use_deterministic_algorithms(False)
    for optimizer in OPTIMIZERS:
        race.run(optimizer, ("recorder",), graph=True)
    return True
