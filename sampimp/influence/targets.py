"""Targets: functions T(theta) of the final parameters whose influence is computed.

    mean                 mean NLL of the test samples, in nats
    class, class:3       mean NLL of the test samples of each class, or of one
    sample:17            NLL of one test sample; sample:0..31 for several
    margin:17            logit of a test sample's class minus the largest other logit
    train:5              NLL of one training sample
    mean-error           mean of 1 - p(class) over the test samples, bounded by 0 and 1
    probe:64             64 random directions r ~ N(0, I): r . theta
    probe:64@L2          the same, on the parameters of one layer
    package.module:function   function(model) -> a scalar tensor

A test or training sample is named by its position, from 0. All are evaluated in evaluation mode.

Map: `Target` (a value and its gradient), `make_targets` (from their names), `as_targets` (from
functions), `MeanTarget`, `ProbeTarget`, `FunctionTarget`.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from sampimp.data import Dataset
from sampimp.errors import ConfigError
from sampimp.importance.evaluation import evaluation_mode
from sampimp.influence.hidden_paths import CutValues
from sampimp.influence.twice_differentiable import native_recurrence
from sampimp.training.models import import_function, parameter_layers

GRAPH_CHUNK = 1000
"""Samples whose graph is held at once (arbitrary)."""

TARGET_SPECS = (
    "mean, class, class:3, sample:0..31, margin:17, train:5, mean-error, probe:64, probe:64@layer, "
    "package.module:function"
)


class Target(Protocol):
    """A function of a model's parameters."""

    @property
    def name(self) -> str:
        """Its name, as `make_targets` reads it."""

    @property
    def units(self) -> str:
        """Units of its value."""

    def value(self, model: nn.Module) -> float:
        """Return T at the model's parameters."""

    def gradient(self, model: nn.Module) -> list[Tensor]:
        """Return dT/dtheta for each of `model.parameters()`, in its shape."""


SampleLosses = Callable[[Tensor, Tensor], Tensor]
"""From logits (N, classes) in float64 and labels (N,) to a value for each sample (N,)."""


def nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the negative log-likelihood of each sample, in nats."""
    return functional.cross_entropy(logits, labels, reduction="none")


def error_probability(logits: Tensor, labels: Tensor) -> Tensor:
    """Return 1 - p(class) of each sample."""
    return 1 - logits.softmax(1).gather(1, labels[:, None]).squeeze(1)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the logit of each sample's class minus the largest other logit."""
    own = logits.gather(1, labels[:, None]).squeeze(1)
    return own - logits.scatter(1, labels[:, None], -torch.inf).amax(1)


@dataclass(frozen=True)
class MeanTarget:
    """The mean over samples of a function of their logits."""

    name: str
    units: str
    losses: SampleLosses
    inputs: Tensor
    """Shape (N, ...)."""
    labels: Tensor
    """Shape (N,)."""

    def _parts(self, model: nn.Module) -> Iterator[Tensor]:
        """Yield terms whose sum is the target."""
        reference = next(model.parameters())
        chunks = (values.split(GRAPH_CHUNK) for values in (self.inputs, self.labels))
        with evaluation_mode(model), native_recurrence(model):
            for inputs_N, labels_N in zip(*chunks, strict=True):
                logits = model(inputs_N.to(reference)).double()
                labels = labels_N.to(logits.device)
                yield self.losses(logits, labels).sum() / len(self.labels)

    def value(self, model: nn.Module) -> float:
        """See `Target`."""
        with torch.no_grad():
            return float(sum(self._parts(model)))

    def gradient(self, model: nn.Module) -> list[Tensor]:
        """See `Target`."""
        parameters = list(model.parameters())
        total = [torch.zeros_like(parameter) for parameter in parameters]
        for part in self._parts(model):
            for summed, gradient in zip(total, _gradients(part, parameters), strict=True):
                summed += gradient
        return total


@dataclass(frozen=True)
class ProbeTarget:
    """A random direction r ~ N(0, I) in the parameters, or in those of one layer: r . theta."""

    name: str
    seed: int
    layer: str | None
    units: str = "parameter"

    def gradient(self, model: nn.Module) -> list[Tensor]:
        """See `Target`; the direction itself, which depends on the seed and the shapes only."""
        generator = torch.Generator().manual_seed(self.seed)
        return [
            torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
            if self.layer in (None, layer)
            else torch.zeros_like(parameter)
            for parameter, (layer, _) in zip(
                model.parameters(), parameter_layers(model), strict=True
            )
        ]

    def value(self, model: nn.Module) -> float:
        """See `Target`."""
        pairs = zip(self.gradient(model), model.parameters(), strict=True)
        return float(
            sum((direction * p.detach()).sum(dtype=torch.float64) for direction, p in pairs)
        )


@dataclass(frozen=True)
class FunctionTarget:
    """A user's own function of the model."""

    name: str
    function: Callable[[nn.Module], Tensor]
    units: str = "1"

    def _call(self, model: nn.Module) -> Tensor:
        cuts = CutValues(f"target {self.name}")
        with evaluation_mode(model), native_recurrence(model), cuts:
            value = self.function(model)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ConfigError(
                expected="a scalar tensor computed from the model's parameters",
                got=got,
                where=f"target {self.name}",
                todo="return one number as a tensor, without detach() or item()",
            )
        if value.requires_grad:
            cuts.require_none_in(value)
        return value

    def value(self, model: nn.Module) -> float:
        """See `Target`."""
        return float(self._call(model).detach())

    def gradient(self, model: nn.Module) -> list[Tensor]:
        """See `Target`."""
        value = self._call(model)
        if not value.requires_grad:
            raise self._constant("a constant")
        gradients = _used_gradients(value, list(model.parameters()))
        if all(gradient is None for gradient in gradients):
            raise self._constant("one that depends on other parameters, as those of a copy")
        return _filled(gradients, list(model.parameters()))

    def _constant(self, got: str) -> ConfigError:
        return ConfigError(
            expected="a value that depends on the model's parameters",
            got=got,
            where=f"target {self.name}",
            todo="compute it from model(inputs), without detach(), item() or torch.no_grad()",
        )


def as_targets(
    targets: Sequence[Target] | Mapping[str, Callable[[nn.Module], Tensor]],
) -> tuple[Target, ...]:
    """Return targets as they are, and functions by name as targets.

    Raises
    ------
    ConfigError
        There is none, or one is a function without a name.
    """
    if isinstance(targets, Mapping):
        targets = [FunctionTarget(name, function) for name, function in targets.items()]
    if not isinstance(targets, Sequence) or not targets or isinstance(targets, str):
        got = "none" if isinstance(targets, Sequence) and not targets else repr(targets)
    else:
        wrong = [target for target in targets if not hasattr(target, "gradient")]
        if not wrong:
            return tuple(targets)
        got = repr(wrong[0])
    raise ConfigError(
        expected='functions by name, {"test loss": test_loss}, or targets of make_targets',
        got=got,
        where="ReversePass, targets",
        todo="pass a dict with one function of the model or more",
    )


def _gradients(value: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradient for each parameter; zero for one that the value does not depend on."""
    return _filled(_used_gradients(value, parameters), parameters)


def _used_gradients(value: Tensor, parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """Return the gradient for each parameter; None for one that the value does not depend on."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    gradients = iter(torch.autograd.grad(value, trained, allow_unused=True))
    return [next(gradients) if p.requires_grad else None for p in parameters]


def _filled(gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> list[Tensor]:
    return [
        # That of an embedding may be sparse.
        torch.zeros_like(parameter) if gradient is None else gradient.to_dense()
        for parameter, gradient in zip(parameters, gradients, strict=True)
    ]


def make_targets(
    specs: Sequence[str], data: Dataset, layers: Sequence[str], *, seed: int = 0
) -> list[Target]:
    """Return the targets that are named.

    Parameters
    ----------
    specs
        Names as in the head of this module.
    data
        The data set of the run.
    layers
        Names of the network's layers.
    seed
        Seed of the probes; probe k of a layer is the same in every call.

    Raises
    ------
    ConfigError
        A name is unknown, is given twice, or names a sample, class or layer that does not exist.

    Examples
    --------
    >>> data = Dataset(np.zeros((4, 2)), np.zeros(4), np.zeros((3, 2)), np.array([0, 1, 1]))
    >>> targets = make_targets(["mean", "class", "sample:0..1", "probe:1@Out"], data, ["Out"])
    >>> [target.name for target in targets]
    ['mean', 'class:0', 'class:1', 'sample:0', 'sample:1', 'probe:0@Out']
    """
    targets = [target for spec in specs for target in _targets_of(spec, data, layers, seed)]
    names = [target.name for target in targets]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated or not targets:
        raise ConfigError(
            expected="one or more targets, each once",
            got=f"{', '.join(repeated)} twice" if repeated else "none",
            where="targets",
            todo="name each of them once",
        )
    return targets


def _targets_of(spec: str, data: Dataset, layers: Sequence[str], seed: int) -> Iterator[Target]:
    kind, _, rest = spec.partition(":")
    if spec == "mean":
        yield _mean_target(spec, "nat", nll, data, slice(None))
    elif spec == "mean-error":
        yield _mean_target(spec, "1", error_probability, data, slice(None))
    elif kind == "class":
        classes = np.unique(data.test_labels).tolist()
        for number in _numbers(spec, rest, classes) if rest else classes:
            chosen = np.flatnonzero(data.test_labels == number).tolist()
            yield _mean_target(f"class:{number}", "nat", nll, data, chosen)
    elif kind in ("sample", "margin"):
        units, losses = ("nat", nll) if kind == "sample" else ("1", margin)
        for number in _numbers(spec, rest, range(len(data.test_labels))):
            yield _mean_target(f"{kind}:{number}", units, losses, data, [number])
    elif kind == "train":
        for number in _numbers(spec, rest, range(len(data.train_labels))):
            yield _mean_target(f"train:{number}", "nat", nll, data, [number], is_test=False)
    elif kind == "probe":
        yield from _probes(spec, rest, layers, seed)
    elif rest and kind.replace(".", "").isidentifier() and rest.isidentifier():
        yield FunctionTarget(spec, import_function(spec, f"target {spec}"))
    else:
        raise _unknown(spec, f"one of {TARGET_SPECS}")


def _mean_target(
    name: str,
    units: str,
    losses: SampleLosses,
    data: Dataset,
    chosen: slice | Sequence[int],
    *,
    is_test: bool = True,
) -> MeanTarget:
    inputs, labels = data[2:] if is_test else data[:2]
    return MeanTarget(
        name, units, losses, torch.from_numpy(inputs[chosen]), torch.from_numpy(labels[chosen])
    )


def _numbers(spec: str, text: str, valid: Sequence[int]) -> list[int]:
    """Return the numbers of "3" or "0..31", all of which must be valid."""
    match = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", text)
    if match is None:
        raise _unknown(spec, "a number, or a range such as 0..31")
    first, last = int(match[1]), int(match[2] or match[1])
    numbers = list(range(first, last + 1))
    if not numbers or any(number not in valid for number in (first, last)):
        raise _unknown(spec, f"numbers from {valid[0]} to {valid[-1]}")
    return numbers


def _probes(spec: str, rest: str, layers: Sequence[str], seed: int) -> Iterator[ProbeTarget]:
    count, _, layer = rest.partition("@")
    if not count.isdecimal() or int(count) < 1:
        raise _unknown(spec, "the number of probes, as in probe:64")
    if layer and layer not in layers:
        raise _unknown(spec, f"a layer among {', '.join(layers)}")
    place = 1 + layers.index(layer) if layer else 0
    for number in range(int(count)):
        name = f"probe:{number}@{layer}" if layer else f"probe:{number}"
        generator = np.random.SeedSequence([seed, place, number]).generate_state(1)
        yield ProbeTarget(name, int(generator[0]), layer or None)


def _unknown(spec: str, expected: str) -> ConfigError:
    return ConfigError(
        expected=expected,
        got=repr(spec),
        where="targets",
        todo="change it; sampimp.influence.targets lists all kinds",
    )
