"""Cost of recording for other networks and optimizers: recorded and plain steps alternate.

Within a round each network makes one plain and one recorded step, in random order; the result is
the median over rounds of their ratio, with its quartiles. A recorded step is the plain step inside
the recorder; in a study it is the study's written-out step, with the optimizer's fused form. Peak
memory is that of three steps, relative to plain steps, in two measures. Allocated: the bytes that
PyTorch allocates in steps without a proof, the same in every run. Resident: the resident set that
Linux reports, above its size before the first step. The latter includes what the C library retains,
which varies with the heap by about a tenth, and code pages at their first use, 5 to 10 MB. The
first step of an epoch proves the row-to-sample mapping and is measured separately: its time and its
allocated bytes, relative to a plain step.
"""

import multiprocessing
import random
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table
from step import describe_machine, note
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from sampimp.importance.recorder import ImportanceRecorder
from sampimp.training.fused import FusedStep
from sampimp.training.models import build_model

HEADINGS = (
    *("network", "optimizer", "batch", "ms", "times plain", "middle half"),
    *("allocated", "resident", "an epoch's first", "allocated there"),
)


class SmallGPT(nn.Module):
    """A GPT-2-small-shaped language model: 12 layers of width 768 with tied embeddings."""

    def __init__(self, tokens: int = 256, words: int = 50_257, width: int = 768) -> None:
        super().__init__()
        self.word, self.place = nn.Embedding(words, width), nn.Embedding(tokens, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 12, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(12)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, words: Tensor) -> Tensor:
        """Return logits (N, words, T)."""
        count = words.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(count, device=words.device)
        inner = self.word(words) + self.place(torch.arange(count, device=words.device))
        for block in self.blocks:
            inner = block(inner, mask, is_causal=True)
        return (self.norm(inner) @ self.word.weight.T).transpose(1, 2)


def of_study(name: str, shape: tuple[int, ...], size: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a network of a study with a batch of random images."""
    model = build_model(name, shape, (512, 512, 512), 10, seed=1)
    return model, torch.rand(size, *shape), torch.randint(0, 10, (size,))


def language(size: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Return the language model with a batch of random words."""
    words = torch.randint(0, 50_257, (size, 256))
    return SmallGPT(), words, words.roll(-1, 1)


CASES: dict[str, tuple[Callable[[], tuple[nn.Module, Tensor, Tensor]], type, int]] = {
    "mlp, 784 inputs, SGD": (partial(of_study, "mlp", (1, 28, 28), 100), torch.optim.SGD, 100),
    "mlp, 3,072 inputs, SGD": (partial(of_study, "mlp", (3, 32, 32), 100), torch.optim.SGD, 100),
    "mlp, 784 inputs": (partial(of_study, "mlp", (1, 28, 28), 100), torch.optim.AdamW, 100),
    "mlp, 3,072 inputs": (partial(of_study, "mlp", (3, 32, 32), 100), torch.optim.AdamW, 100),
    "mlp, 784, in a study": (partial(of_study, "mlp", (1, 28, 28), 100), torch.optim.AdamW, 100),
    "mlp, 3,072, in a study": (partial(of_study, "mlp", (3, 32, 32), 100), torch.optim.AdamW, 100),
    "cnn, 28 x 28": (partial(of_study, "cnn", (1, 28, 28), 100), torch.optim.SGD, 100),
    "resnet18, 32 x 32": (partial(of_study, "resnet18", (3, 32, 32), 128), torch.optim.SGD, 128),
    "lstm, 28 rows": (partial(of_study, "lstm", (1, 28, 28), 100), torch.optim.SGD, 100),
    "gru, 28 rows": (partial(of_study, "gru", (1, 28, 28), 100), torch.optim.SGD, 100),
    "transformer, 28 rows": (
        partial(of_study, "transformer", (1, 28, 28), 100),
        torch.optim.SGD,
        100,
    ),
    "GPT-2 small, 256 tokens": (partial(language, 2), torch.optim.SGD, 2),
}
"""Network with data, optimizer, and batch size, by name."""


class Contender:
    """A network with one batch, an optimizer, and a recorder if `records`."""

    def __init__(self, name: str, records: bool, device: str = "cpu") -> None:
        make, optimizer, self.size = CASES[name]
        torch.manual_seed(0)
        model, inputs, labels = make()
        self.model, self.inputs, self.labels = (
            model.to(device),
            inputs.to(device),
            labels.to(device),
        )
        self.fused: FusedStep | None = None
        self.recorder: ImportanceRecorder | None = None
        self.epoch = 1
        in_study = records and name.endswith("in a study")
        self.optimizer = optimizer(self.model.parameters(), lr=1e-3, fused=in_study)
        if in_study:
            assert isinstance(self.model, nn.Sequential)
            self.fused = FusedStep(self.model, self.optimizer, record=True)
        elif records:
            self.recorder = ImportanceRecorder(self.model, self.optimizer)

    def step(self) -> None:
        """Train on the batch."""
        if self.fused:
            self.fused(self.inputs, self.labels)
            return
        index = range(self.size)
        with self.recorder.step(index, epoch=self.epoch) if self.recorder else nullcontext():
            self.optimizer.zero_grad()
            functional.cross_entropy(self.model(self.inputs), self.labels).backward()
            self.optimizer.step()


def resident(name: str, records: bool, threads: int) -> int:
    """Return the growth of the peak resident set in bytes; call it in a fresh process."""
    torch.set_num_threads(threads)
    contender = Contender(name, records)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    for _ in range(3):
        contender.step()
    return memory("VmHWM") - before


def allocated(name: str, records: bool, threads: int, proves: bool = False) -> int:
    """Return the peak of bytes that PyTorch allocates in steps, or in the first of an epoch."""
    torch.set_num_threads(threads)
    contender = Contender(name, records)
    for _ in range(2):  # steps with a proof
        contender.step()
    contender.epoch += proves
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for _ in range(1 if proves else 3):
            contender.step()
    result = profiler.profiler
    assert result is not None
    events = [event for event in result.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events))


def memory(what: str) -> int:
    """Return a memory size of this process in bytes: VmRSS (now) or VmHWM (peak)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"no {what} in /proc/self/status")


def measure(name: str, rounds: int, threads: int) -> tuple[str, ...]:
    """Return a row of the table."""
    contenders = {records: Contender(name, records) for records in (False, True)}
    order, chance = list(contenders), random.Random(1)
    seconds: dict[bool, list[float]] = {records: [] for records in order}
    for number in range(-2, rounds):  # the first steps allocate memory
        chance.shuffle(order)
        for records in order:
            start = time.perf_counter()
            contenders[records].step()
            if number >= 0:
                seconds[records].append(time.perf_counter() - start)
    pairs = zip(seconds[False], seconds[True], strict=True)
    ratios = [recorded / plain for plain, recorded in pairs]
    first = []
    for _ in range(max(1, rounds // 10)):
        contenders[True].epoch += 1
        start = time.perf_counter()
        contenders[True].step()
        first.append((time.perf_counter() - start) / statistics.median(seconds[False]))
    lower, middle, upper = statistics.quantiles(ratios, n=4, method="inclusive")
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        peaks = [
            [pool.apply(peak, (name, records, threads)) for records in (False, True)]
            for peak in (allocated, resident)
        ]
        peaks += [[peaks[0][0], pool.apply(allocated, (name, True, threads, True))]]
    compared = [f"{recorded / plain:.2f}" for plain, recorded in peaks]
    compared.insert(2, f"{statistics.median(first):.1f}")
    return (
        name,
        CASES[name][1].__name__,
        str(contenders[True].size),
        f"{1e3 * statistics.median(seconds[False]):.1f}",
        f"{middle:.2f}",
        f"{lower:.2f} to {upper:.2f}",
        *compared,
    )


def main(
    rounds: int = 30, threads: int = 1, only: tuple[str, ...] = (), out: Path | None = None
) -> None:
    """Measure and print the cost of recording.

    Parameters
    ----------
    rounds
        Rounds for each network; a tenth of it for networks whose step takes over a second.
    threads
        CPU threads.
    only
        Names of networks, or parts of them; by default all.
    out
        Also write the table to this file, as Markdown.
    """
    console = Console()
    torch.set_num_threads(threads)
    names = [name for name in CASES if not only or any(part in name for part in only)]
    rows = []
    for name in names:
        heavy = name.startswith(("GPT", "resnet"))
        with console.status(name):
            rows.append(measure(name, max(3, rounds // 10) if heavy else rounds, threads))
    table = Table(*HEADINGS, title="One training step with recording")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    words = note(describe_machine())
    console.print(words, highlight=False)
    if out is not None:
        lines = ["| " + " | ".join(cells) + " |" for cells in (HEADINGS, *rows)]
        lines.insert(1, "|:---|:---|---:|---:|---:|---:|---:|---:|---:|---:|")
        out.write_text("\n".join([*lines, "", words, ""]))


if __name__ == "__main__":
    tyro.cli(main)
