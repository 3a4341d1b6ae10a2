"""Exactness on a device: recorded importance, bytes of the training, no synchronisation.

    float64     importance in the tests' networks, which cover every layer rule, under every
                optimizer, against a loop over single samples and autograd through the optimizer's
                step, both on the CPU
    forms       the same for the foreach, fused and capturable implementation of an optimizer
    float32     the same networks in single precision without TF32, against float64
    bytes       parameters after recorded and after plain training, bit for bit, with
                deterministic algorithms
    waiting     recorded steps after the first of an epoch, with indices on the CPU, while CUDA's
                debug mode turns every synchronisation into an error

The table names the first failure of each row; all failures are printed.
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
from gpu_report import NEEDS_CUDA, Checks, PlainStepError, Report
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
"""Largest error, relative to the largest value of the layer. The first is the bound of the tests;
the second is arbitrary: errors on a CPU are at most a hundredth of it."""

SETTINGS_IN_SINGLE = {"sgd": {}, "adamw": {"eps": 1e-2}}
"""Where a gradient is rounding error alone (the bias of an attention key), Adam's derivative is
rate / eps; with a larger eps such a bias adds little to the importance of its layer."""

FORMS = {
    "sgd": ("foreach", "fused"),
    "adam": ("foreach", "fused", "capturable"),
    "adamw": ("foreach", "fused", "capturable"),
    "rmsprop": ("foreach", "capturable"),
    "adagrad": ("foreach",),
}
"""Implementations of optimizers; by default PyTorch chooses one (foreach on a GPU)."""
CASES_OF_FORMS = ("linear", "convolutions on one another", "language model")

SCALE = torch.tensor([0.4, 1.3, -0.7], dtype=torch.float64)
"""Weights of the samples' losses (arbitrary)."""


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Set the default type of new tensors."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def case_on(name: str, device: str, dtype: torch.dtype = torch.float64) -> Any:
    """Return a network of the tests with its batch; the values are the same on every device."""
    with default_dtype(torch.float64):
        torch.manual_seed(1)
        case = networks.CASES[name]()
    case.model.to(device, dtype)
    case.inputs = tuple(
        values.to(device, dtype if values.is_floating_point() else None) for values in case.inputs
    )
    return case


@cache
def case_with_gradients(name: str, device: str) -> tuple[Any, dict[str, Tensor]]:
    """Return a network, and per-sample gradients from passes of single samples.

    With dropout they come from one pass of the batch, on the device that draws the masks.
    """
    case = case_on(name, device if networks.CASES[name]().random else "cpu")
    with default_dtype(torch.float64):
        if case.random:
            gradients = oracles.gradients_by_loss(case.model, case.losses())
        else:
            passes = [
                oracles.gradients_by_loss(case.model, case.losses(sample))
                for sample in range(networks.N)
            ]
            gradients = {key: torch.cat([grads[key] for grads in passes]) for key in passes[0]}
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
    """Return the largest error of a recorded step, relative to the largest value of its layer.

    `settings` configure the oracle's optimizer too; `form` only the optimizer on the device.
    """
    case, gradients = case_with_gradients(name, device)
    with default_dtype(torch.float64):
        moved = oracles.moved_optimizer(optimizer, case.model, gradients)
        for group in moved.param_groups:
            group.update(settings)
        expected = oracles.importance_by_update(case.model, moved, gradients)
    state = copy.deepcopy(moved.state_dict())
    for group in state["param_groups"]:
        group.update(form)

    def make() -> tuple[Any, torch.optim.Optimizer]:
        twin = case_on(name, device, dtype)
        kind, options = oracles.OPTIMIZERS[optimizer]
        twin_optimizer = kind(twin.model.parameters(), lr=0.1, **options, **form)
        twin_optimizer.load_state_dict(copy.deepcopy(state))
        return twin, twin_optimizer

    with default_dtype(dtype):
        try:
            recorded = networks.recorded(*make(), SCALE.to(device, dtype))
        except UnsupportedError:
            raise
        except Exception:
            with plain_step():
                twin, twin_optimizer = make()
                twin.losses().sum().backward()
                twin_optimizer.step()
            raise
    if recorded.keys() != expected.keys():
        raise RuntimeError(f"layers {list(recorded)}, expected {list(expected)}")
    largest = 0.0
    for layer, beta in expected.items():
        error = (recorded[layer].double() - beta.cpu()).abs().max()
        scale = beta.max().cpu()
        largest = max(largest, float(error / scale) if scale else float(error))
        if not torch.isfinite(error):
            return torch.inf
    return largest


@contextmanager
def plain_step() -> Iterator[None]:
    """Turn an error into a PlainStepError: recording has no part in it."""
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
    """Train on batches of one epoch, with indices on the CPU."""
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
    """Return a network with the same values in every call, and four batches."""
    generator = torch.Generator().manual_seed(1)
    size = 8 if quick else 64
    if name == "language model":
        torch.manual_seed(1)
        model: nn.Module = SmallGPT(tokens=16, words=100, width=48)
        words = [torch.randint(0, 100, (size, 16), generator=generator) for _ in range(4)]
        batches = [(tokens, tokens.roll(-1, 1)) for tokens in words]
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
    return model.to(device), [(inputs.to(device), labels.to(device)) for inputs, labels in batches]


def differing_entries(name: str, kind: type[Any], device: str, quick: bool) -> float:
    """Return the number of parameter entries that differ between recorded and plain training."""
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
    """Return the same number for the written-out step of a study."""
    trained = [written_out(kind, device, quick, record=record) for record in (False, True)]
    return float(sum(int((a != b).sum()) for a, b in zip(*trained, strict=True)))


def differing_entries_from_autograd(kind: type[Any], device: str, quick: bool) -> float:
    """Return the number of parameter entries that differ between a study's steps and autograd's."""
    model, batches = network_of_study("mlp", device, quick)
    optimizer = kind(model.parameters(), lr=1e-2, fused=True)
    with plain_step():
        for inputs, labels in batches:
            optimizer.zero_grad()
            functional.cross_entropy(model(inputs).double(), labels).backward()
            optimizer.step()
    trained = written_out(kind, device, quick, record=True)
    pairs = zip(model.parameters(), trained, strict=True)
    return float(sum(int((a != b).sum()) for a, b in pairs))


def written_out(kind: type[Any], device: str, quick: bool, *, record: bool) -> list[Tensor]:
    """Return the parameters after four written-out steps."""
    model, batches = network_of_study("mlp", device, quick)
    assert isinstance(model, nn.Sequential)
    step = FusedStep(model, kind(model.parameters(), lr=1e-2, fused=True), record=record)
    for batch in batches:
        step(*batch)
    return [parameter.detach() for parameter in model.parameters()]


@contextmanager
def no_waiting() -> Iterator[None]:
    """Turn every synchronisation with the GPU into an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def guard(step: int) -> Any:
    """Return a context that forbids synchronisation in steps without a proof.

    The first step of an epoch is proved, and the second too where a parameter starts at zero.
    """
    return no_waiting() if step > 1 else nullcontext()


def wait(name: str, kind: type[Any], device: str, quick: bool) -> float:
    """Raise an error if a recorded step without a proof waits for the GPU; return 0.0."""
    for records in (False, True):
        model, batches = network_of_study(name, device, quick)
        optimizer = kind(model.parameters(), lr=1e-2)
        recorder = ImportanceRecorder(model, optimizer) if records else None
        with nullcontext() if records else plain_step():
            train(model, optimizer, batches, recorder, guard)
    return 0.0


def wait_of_study(kind: type[Any], device: str, quick: bool) -> float:
    """Raise an error if a written-out step waits for the GPU; return 0.0."""
    model, batches = network_of_study("mlp", device, quick)
    assert isinstance(model, nn.Sequential)
    step = FusedStep(model, kind(model.parameters(), lr=1e-2, fused=True), record=True)
    for number, batch in enumerate(batches):
        with guard(number):
            step(*batch)
    return 0.0


CheckOfNetwork = Callable[[str, type[Any], str, bool], float]
CheckOfStudy = Callable[[type[Any], str, bool], float]


class Exactness:
    """All checks on one device, with the table that they fill; `quick` takes some networks."""

    def __init__(self, device: Literal["cpu", "cuda"], quick: bool, report: Report) -> None:
        self.device, self.quick, self.report = device, quick, report
        self.cases = list(networks.CASES)[:: 12 if quick else 1]
        self.networks = ("mlp", "transformer") if quick else (*MODELS, "language model")
        self.holds: list[bool] = []

    def check_importance(
        self,
        optimizer: str,
        dtype: torch.dtype = torch.float64,
        settings: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """Compare recorded importance with the oracle in all networks of the tests."""
        bound = DOUBLE if dtype == torch.float64 else SINGLE
        what = f"{str(dtype).removeprefix('torch.')}, all layers, {optimizer}"
        checks = Checks(self.report, what, bound)
        for name in self.cases:
            # In another precision the random generator draws other dropout masks.
            if dtype == torch.float64 or not networks.CASES[name]().random:
                error = partial(
                    error_of_step, name, optimizer, self.device, dtype, settings=settings
                )
                checks.check(name, error)
        self.holds.append(checks.close())

    def check_form(self, optimizer: str, form: str) -> None:
        """Compare recorded importance under one implementation of an optimizer."""
        what = f"float64, {optimizer}, {form}"
        if form == "capturable" and self.device == "cpu":
            self.report.row(what, "", "", "", NEEDS_CUDA)
            return
        checks = Checks(self.report, what, DOUBLE)
        for name in CASES_OF_FORMS:
            error = partial(error_of_step, name, optimizer, self.device, form={form: True})
            checks.check(name, error)
        self.holds.append(checks.close())

    def check_training(
        self, what: str, error_of: CheckOfNetwork, error_of_study: CheckOfStudy
    ) -> None:
        """Check recorded training of the study's networks under SGD and AdamW."""
        checks = Checks(self.report, what)
        for kind in (torch.optim.SGD, torch.optim.AdamW):
            for name in self.networks:
                error = partial(error_of, name, kind, self.device, self.quick)
                checks.check(f"{name}, {kind.__name__}", error)
            study = partial(error_of_study, kind, self.device, self.quick)
            checks.check(f"a study's step, {kind.__name__}", study)
        self.holds.append(checks.close())

    def check_bytes(self) -> None:
        """Compare parameters after recorded and after plain training, bit for bit."""
        self.check_training(
            "bytes of trained parameters, recorded and plain",
            differing_entries,
            differing_entries_of_study,
        )
        what = "bytes of a study's step and autograd's; promised on a CPU only"
        checks = Checks(self.report, what)
        for kind in (torch.optim.SGD, torch.optim.AdamW):
            error = partial(differing_entries_from_autograd, kind, self.device, self.quick)
            checks.check(kind.__name__, error)
        equal = checks.close()
        self.holds.append(equal or self.device == "cuda")

    def check_waiting(self) -> None:
        """Check that recorded steps without a proof synchronise nothing."""
        what = "a recorded step after the epoch's first waits for nothing"
        if self.device == "cuda":
            self.check_training(what, wait, wait_of_study)
        else:
            self.report.row(what, "", "", "", NEEDS_CUDA)


def run(device: Literal["cpu", "cuda"], quick: bool, directory: Path) -> bool:
    """Check everything and return whether it holds; `quick` takes some of the networks."""
    # From copies in the oracles, which are no leaves, and from functions that vmap loops over.
    for message in ("The .grad attribute", "There is a perf"):
        warnings.filterwarnings("ignore", message=message)
    torch.set_num_threads(1)  # the oracles' operations are small
    use_deterministic_algorithms()  # sets a variable that cuBLAS reads at its first use
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    headings = ("what", "checks", "largest error", "bound", "outcome")
    report = Report(directory / "exactness.md", f"Exactness on {device}", headings, device)
    exactness = Exactness(device, quick, report)
    first = ("sgd", "adamw")
    for optimizer in first:
        exactness.check_importance(optimizer)
    torch.use_deterministic_algorithms(True)
    exactness.check_bytes()
    torch.use_deterministic_algorithms(False)
    exactness.check_waiting()
    for optimizer, settings in SETTINGS_IN_SINGLE.items():
        exactness.check_importance(optimizer, torch.float32, settings)
    for optimizer, forms in FORMS.items():
        for form in forms:
            exactness.check_form(optimizer, form)
    for optimizer in () if quick else oracles.OPTIMIZERS:
        if optimizer not in first:
            exactness.check_importance(optimizer)
    holds = all(exactness.holds)
    report.summarise(f"exactness: {'holds' if holds else 'DOES NOT HOLD'}")
    return holds
