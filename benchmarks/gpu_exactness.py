"""What a device records is what the definition says, training is as without, and nothing waits.

    float64     the tests' networks, which meet every layer rule, under every optimizer, against the
                loop over single samples and the optimizer's own step by autograd, on the CPU
    forms       the same of an optimizer's foreach, fused and capturable form
    float32     the same networks in single precision without TF32, against float64
    bytes       parameters after recorded training and after plain training, bit for bit, with
                deterministic algorithms
    waiting     a recorded step after its epoch's first, with indices on the CPU, while CUDA's
                debug mode makes every synchronisation an error

The table names the first failure of each row; all of them are printed.
"""

import copy
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from gpu_report import NEEDS_CUDA, Report, one_line
from models import SmallGPT
from torch import Tensor, nn
from torch.nn import functional

from sampimp.config import MODELS
from sampimp.errors import UnsupportedError
from sampimp.importance.recorder import ImportanceRecorder
from sampimp.training.fused import FusedStep
from sampimp.training.loop import use_deterministic_algorithms
from sampimp.training.models import build_model

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
import networks
import oracles

DOUBLE, SINGLE = 1e-9, 1e-3
"""Largest error, relative to a layer's largest value. The first is that of the tests; the second is
arbitrary, and a CPU's errors are up to a hundredth of it."""

SETTINGS_IN_SINGLE = {"sgd": {}, "adamw": {"eps": 1e-2}}
"""Where a gradient is nothing but rounding, as of a key's bias in attention, Adam's derivative is
rate / eps of it; with a larger eps it is little of the layer's importance."""

REFUSED_ON_GPU = ("dropout between layers", "with projections")
"""Recurrent layers that are recorded only where autograd's graph shows their inside, on a CPU."""

FORMS = {
    "sgd": ("foreach", "fused"),
    "adam": ("foreach", "fused", "capturable"),
    "adamw": ("foreach", "fused", "capturable"),
    "rmsprop": ("foreach", "capturable"),
    "adagrad": ("foreach",),
}
"""Forms of optimizers; without any, PyTorch chooses (foreach on a GPU)."""
OF_FORMS = ("linear", "convolutions on one another", "language model")

SCALE = torch.tensor([0.4, 1.3, -0.7], dtype=torch.float64)
"""Weights of the samples' losses (arbitrary)."""


class PlainStepError(RuntimeError):
    """A plain step does not work here either, so that a recorded one cannot be judged."""


class Checks:
    """Counts and names what was checked under one row of the table."""

    def __init__(self, report: Report, what: str, bound: float | None = None) -> None:
        self._report, self._what, self._bound = report, what, bound
        self._largest, self._place, self._count = 0.0, "", 0
        self._refused: list[str] = []
        self._unknown: list[str] = []
        self._failures: list[str] = []

    def check(self, name: str, error_of: Callable[[], float]) -> None:
        """Take in an error, or what is raised instead of one."""
        self._count += 1
        try:
            error = error_of()
        except UnsupportedError as refusal:
            if any(words in name for words in REFUSED_ON_GPU):
                self._refused.append(name)
            else:
                self._fail(name, one_line(refusal))
        except PlainStepError as error_of_plain:
            cause = error_of_plain.__cause__ or error_of_plain
            self._unknown.append(f"{name} ({one_line(cause)})")
        except Exception as failure:  # of any kind: the others are to be checked all the same
            self._fail(name, one_line(failure))
        else:
            if error >= self._largest:
                self._largest, self._place = error, name
            if not error <= (self._bound or 0.0):
                self._fail(name, f"error {error:.1e}")

    def _fail(self, name: str, why: str) -> None:
        self._failures.append(f"{name}: {why}")
        print(f"FAILED {self._what}, {name}: {why}", flush=True)

    def close(self) -> bool:
        """Write the row and return whether everything holds."""
        bound = "" if self._bound is None else f"{self._bound:.0e}"
        largest = "" if self._bound is None else f"{self._largest:.1e} ({self._place})"
        outcome = "holds"
        if self._failures:
            outcome = f"{len(self._failures)} FAILED, first {self._failures[0]}"
        if self._refused:
            outcome += f"; {len(self._refused)} refused, as documented: {', '.join(self._refused)}"
        if self._unknown:
            outcome += f"; not known, since the plain step fails: {', '.join(self._unknown)}"
        self._report.row(self._what, str(self._count), largest, bound, outcome)
        return not self._failures


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make new tensors of this type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def case_on(name: str, device: str, dtype: torch.dtype = torch.float64) -> Any:
    """Return one of the tests' networks with its batch, the same values on every device."""
    with default_dtype(torch.float64):
        torch.manual_seed(1)
        case = networks.CASES[name]()
    case.model.to(device, dtype)
    case.inputs = tuple(
        one.to(device, dtype if one.is_floating_point() else None) for one in case.inputs
    )
    return case


@cache
def case_with_gradients(name: str, device: str) -> tuple[Any, dict[str, Tensor]]:
    """Return a network, and each sample's gradients from passes of single samples.

    Where masks are drawn they come from one pass of all, on the device that draws them.
    """
    case = case_on(name, device if networks.CASES[name]().random else "cpu")
    with default_dtype(torch.float64):
        if case.random:
            gradients = oracles.gradients_by_loss(case.model, case.losses())
        else:
            each = [
                oracles.gradients_by_loss(case.model, case.losses(sample))
                for sample in range(networks.N)
            ]
            gradients = {key: torch.cat([one[key] for one in each]) for key in each[0]}
        scale = SCALE.to(next(iter(gradients.values())).device)
        return case, oracles.weighted(gradients, scale)


def error_of_step(
    name: str,
    optimizer: str,
    device: str,
    dtype: torch.dtype = torch.float64,
    *,
    settings: Mapping[str, float] = MappingProxyType({}),
    form: Mapping[str, bool] = MappingProxyType({}),
) -> float:
    """Return the largest error of a recorded step, relative to each layer's largest value.

    The settings are for the oracle's optimizer too, the form only for the device's.
    """
    case, gradients = case_with_gradients(name, device)
    with default_dtype(torch.float64):
        moved = oracles.moved_optimizer(optimizer, case.model, gradients)
        for group in moved.param_groups:
            group.update(settings)
        want = oracles.importance_by_update(case.model, moved, gradients)
    state = copy.deepcopy(moved.state_dict())
    for group in state["param_groups"]:
        group.update(form)

    def make() -> tuple[Any, torch.optim.Optimizer]:
        twin = case_on(name, device, dtype)
        kind, options = oracles.OPTIMIZERS[optimizer]
        own = kind(twin.model.parameters(), lr=0.1, **options, **form)
        own.load_state_dict(copy.deepcopy(state))
        return twin, own

    with default_dtype(dtype):
        try:
            got = networks.recorded(*make(), SCALE.to(device, dtype))
        except UnsupportedError:
            raise
        except Exception:
            with plain_step():
                twin, own = make()
                twin.losses().sum().backward()
                own.step()
            raise
    if got.keys() != want.keys():
        raise RuntimeError(f"layers {list(got)}, expected {list(want)}")
    largest = 0.0
    for layer, beta in want.items():
        error = (got[layer].double() - beta.cpu()).abs().max()
        scale = beta.max().cpu()
        largest = max(largest, float(error / scale) if scale else float(error))
        if not torch.isfinite(error):
            return torch.inf
    return largest


@contextmanager
def plain_step() -> Iterator[None]:
    """Let an error say that recording has no part in it."""
    try:
        yield
    except Exception as error:
        raise PlainStepError(str(error)) from error


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[tuple[Tensor, Tensor]],
    recorder: ImportanceRecorder | None,
    guard: Callable[[int], Any] = lambda step: nullcontext(),
) -> None:
    """Train on batches, all in one epoch; indices are on the CPU."""
    for step, (inputs, labels) in enumerate(batches):
        index = torch.arange(step * len(inputs), (step + 1) * len(inputs))
        with guard(step), recorder.step(index, epoch=1) if recorder else nullcontext():
            optimizer.zero_grad()
            logits = model(inputs)
            if logits.dim() == 3:  # of words; a loss of two axes has no deterministic form on CUDA
                logits, labels = logits.transpose(1, 2).flatten(0, 1), labels.flatten()
            functional.cross_entropy(logits, labels).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()


def network_of_study(
    name: str, device: str, quick: bool
) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """Return a network, always with the same values, and four batches."""
    generator = torch.Generator().manual_seed(1)
    size = 8 if quick else 64
    if name == "language model":
        torch.manual_seed(1)
        model: nn.Module = SmallGPT(tokens=16, words=100, width=48)
        words = [torch.randint(0, 100, (size, 16), generator=generator) for _ in range(4)]
        batches = [(one, one.roll(-1, 1)) for one in words]
    else:
        shape = (3, 32, 32) if name == "resnet18" else (1, 28, 28)
        model = build_model(name, shape, (512, 512, 512), 10, seed=1)
        batches = [
            (
                torch.rand(size, *shape, generator=generator),
                torch.randint(0, 10, (size,), generator=generator),
            )
            for _ in range(4)
        ]
    return model.to(device), [(one.to(device), labels.to(device)) for one, labels in batches]


def differing_entries(name: str, kind: type[Any], device: str, quick: bool) -> float:
    """Return in how many entries the parameters after recorded and plain training differ."""
    trained = []
    for records in (False, True):
        model, batches = network_of_study(name, device, quick)
        optimizer = kind(model.parameters(), lr=1e-2)
        recorder = ImportanceRecorder(model, optimizer) if records else None
        with nullcontext() if records else plain_step():
            train(model, optimizer, batches, recorder)
        trained.append([parameter.detach() for parameter in model.parameters()])
    return float(sum(int((a != b).sum()) for a, b in zip(*trained, strict=True)))


def differing_entries_of_study(kind: type[Any], device: str, quick: bool) -> float:
    """Return the same of a study's step, which is written out."""
    trained = [written_out(kind, device, quick, record=record) for record in (False, True)]
    return float(sum(int((a != b).sum()) for a, b in zip(*trained, strict=True)))


def differing_entries_from_autograd(kind: type[Any], device: str, quick: bool) -> float:
    """Return in how many entries the parameters after a study's steps and autograd's differ."""
    model, batches = network_of_study("mlp", device, quick)
    optimizer = kind(model.parameters(), lr=1e-2, fused=True)
    with plain_step():
        for inputs, labels in batches:
            optimizer.zero_grad()
            functional.cross_entropy(model(inputs).double(), labels).backward()
            optimizer.step()
    own = written_out(kind, device, quick, record=True)
    return float(sum(int((a != b).sum()) for a, b in zip(model.parameters(), own, strict=True)))


def written_out(kind: type[Any], device: str, quick: bool, *, record: bool) -> list[Tensor]:
    """Return the parameters after a study's steps."""
    model, batches = network_of_study("mlp", device, quick)
    assert isinstance(model, nn.Sequential)
    step = FusedStep(model, kind(model.parameters(), lr=1e-2, fused=True), record=record)
    for batch in batches:
        step(*batch)
    return [parameter.detach() for parameter in model.parameters()]


@contextmanager
def no_waiting() -> Iterator[None]:
    """Make every synchronisation with the GPU an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def guard(step: int) -> Any:
    """Return a context in which steps that prove nothing must not wait.

    An epoch's first step is proved, and the second too where a parameter starts at zero.
    """
    return no_waiting() if step > 1 else nullcontext()


def wait(name: str, kind: type[Any], device: str, quick: bool) -> float:
    """Raise an error if a recorded step that proves nothing waits for the GPU, a plain one not."""
    for records in (False, True):
        model, batches = network_of_study(name, device, quick)
        optimizer = kind(model.parameters(), lr=1e-2)
        recorder = ImportanceRecorder(model, optimizer) if records else None
        with nullcontext() if records else plain_step():
            train(model, optimizer, batches, recorder, guard)
    return 0.0


def wait_of_study(kind: type[Any], device: str, quick: bool) -> float:
    """Raise an error if the written-out step waits for the GPU."""
    model, batches = network_of_study("mlp", device, quick)
    assert isinstance(model, nn.Sequential)
    step = FusedStep(model, kind(model.parameters(), lr=1e-2, fused=True), record=True)
    for number, batch in enumerate(batches):
        with guard(number):
            step(*batch)
    return 0.0


def run(device: Literal["cpu", "cuda"], quick: bool, directory: Path) -> bool:
    """Check everything and return whether it holds; `quick` takes some of the networks."""
    # Of the copies in the oracles, which are no leaves, and of functions that vmap loops over.
    for message in ("The .grad attribute", "There is a perf"):
        warnings.filterwarnings("ignore", message=message)
    torch.set_num_threads(1)  # the oracles' operations are small
    use_deterministic_algorithms()  # sets a variable that cuBLAS reads at its first use
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    report = Report(
        directory / "exactness.md",
        f"Exactness on {device}",
        ("what", "checks", "largest error", "bound", "outcome"),
        device,
    )
    cases = list(networks.CASES)[:: 12 if quick else 1]
    names = ("mlp", "transformer") if quick else (*MODELS, "language model")
    holds = []

    def of_cases(
        optimizer: str,
        dtype: torch.dtype = torch.float64,
        settings: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        bound = DOUBLE if dtype == torch.float64 else SINGLE
        what = f"{str(dtype).removeprefix('torch.')}, all layers, {optimizer}"
        checks = Checks(report, what, bound)
        for name in cases:
            # Masks are drawn otherwise in another precision.
            if dtype == torch.float64 or not networks.CASES[name]().random:
                own = partial(error_of_step, name, optimizer, device, dtype, settings=settings)
                checks.check(name, own)
        holds.append(checks.close())

    def of_networks(
        what: str,
        check: Callable[[str, type[Any], str, bool], float],
        check_study: Callable[[type[Any], str, bool], float],
    ) -> None:
        checks = Checks(report, what)
        for kind in (torch.optim.SGD, torch.optim.AdamW):
            for name in names:
                checks.check(f"{name}, {kind.__name__}", partial(check, name, kind, device, quick))
            study = partial(check_study, kind, device, quick)
            checks.check(f"a study's step, {kind.__name__}", study)
        holds.append(checks.close())

    first = ("sgd", "adamw")
    for optimizer in first:
        of_cases(optimizer)
    torch.use_deterministic_algorithms(True)
    of_networks(
        "bytes of trained parameters, recorded and plain",
        differing_entries,
        differing_entries_of_study,
    )
    checks = Checks(report, "the same of a study's step and autograd's; claimed on a CPU alone")
    for kind in (torch.optim.SGD, torch.optim.AdamW):
        own = partial(differing_entries_from_autograd, kind, device, quick)
        checks.check(kind.__name__, own)
    held = checks.close()
    holds.append(held or device == "cuda")
    torch.use_deterministic_algorithms(False)
    waiting = "a recorded step after the epoch's first waits for nothing"
    if device == "cuda":
        of_networks(waiting, wait, wait_of_study)
    else:
        report.row(waiting, "", "", "", NEEDS_CUDA)
    for optimizer, settings in SETTINGS_IN_SINGLE.items():
        of_cases(optimizer, torch.float32, settings)
    for optimizer, forms in FORMS.items():
        for form in forms:
            what = f"float64, {optimizer}, {form}"
            if form == "capturable" and device == "cpu":
                report.row(what, "", "", "", NEEDS_CUDA)
                continue
            checks = Checks(report, what, DOUBLE)
            for name in OF_FORMS:
                own = partial(error_of_step, name, optimizer, device, form={form: True})
                checks.check(name, own)
            holds.append(checks.close())
    for optimizer in oracles.OPTIMIZERS:
        if optimizer not in first and not quick:
            of_cases(optimizer)
    report.summarise(f"exactness: {'holds' if all(holds) else 'DOES NOT HOLD'}")
    return all(holds)
