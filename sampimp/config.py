"""The configuration that determines a run's numbers, as frozen dataclasses with checks.

The defaults are the paper's (Gao & Jojic 2017, section 3.1). A trial's fingerprint is the digest of
everything in its `TrialConfig`, of the data, of the code's version, of the reference run that its
strategy sorts by, and of the identity of a user's own network. Two trials with equal fingerprints
are the same experiment.

Map: `TrainingConfig` (how networks are trained), `TrialConfig` (one run, and its fingerprint),
`NetworkIdentity` (a user's own network), `OPTIMIZERS`, `MODELS` and `RELU_MODELS` (names),
`check_choice`.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from sampimp.errors import ConfigError
from sampimp.schema import REFERENCES, STRATEGIES, digest_json

OPTIMIZERS = {"sgd": "SGD", "momentum": "SGD, momentum 0.9", "adam": "Adam", "adamw": "AdamW"}
"""Names of the optimizers in results."""

MODELS = ("mlp", "cnn", "resnet18", "lstm", "gru", "transformer")
"""The networks of `sampimp.training.models`."""

RELU_MODELS = ("mlp", "cnn", "resnet18", "transformer")
"""Those with ReLUs, which another activation can replace."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How every network of a study is trained."""

    LATER_ENTRIES: ClassVar = frozenset({"activation", "model", "optimizer", "schedule", "workers"})
    """Entries that plans of earlier versions lack: their trials had the defaults."""

    model: str = "mlp"
    """The network: mlp (the paper's), cnn, resnet18, lstm, gru, transformer, or your own as
    package.module:function, called with the shape of a sample and the number of classes."""
    input_scaling: Literal["unit", "standard"] = "unit"
    """Inputs in [0, 1], or standardised over the training set; the paper does not state it."""
    hidden: tuple[int, ...] = (512, 512, 512)
    """Units of each hidden layer of the mlp."""
    activation: Literal["relu", "gelu", "silu", "tanh", "softplus"] = "relu"
    """Activation of mlp, cnn, resnet18 and transformer; softplus has beta 10. The recurrent
    networks and your own keep theirs, and accept no other value than relu."""
    epochs: int = 50
    """Passes over the training set."""
    batch_size: int = 100
    """Largest number of samples in a batch."""
    optimizer: Literal["sgd", "momentum", "adam", "adamw"] = "sgd"
    """Plain SGD as in the paper, SGD with momentum 0.9, Adam or AdamW with their usual betas."""
    learning_rate: float = 0.1
    """Learning rate of the optimizer in the first epoch."""
    schedule: Literal["constant", "cosine", "step"] = "constant"
    """Learning rate over the epochs: constant, along a cosine towards 0, or divided by ten after
    one half and again after three quarters of the epochs."""
    weight_decay: float = 1e-5
    """This factor times the parameters is added to the gradient of the mean loss."""
    parameters_every: int = 1
    """Store all parameters every N epochs, and at the start and the end; 0 stores none."""
    threads: int = 1
    """CPU threads of a trial; part of its identity, since threads change the order of sums."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device of a trial."""
    workers: int = 1
    """Workers that share each batch of a trial; part of its identity, since they change the order
    of sums."""

    def __post_init__(self) -> None:
        """Raise ConfigError for a value that training does not support."""
        for name in ("epochs", "batch_size", "threads", "workers"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("weight_decay", "parameters_every"):
            _require(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        rate = self.learning_rate
        _require(math.isfinite(rate) and rate > 0, "learning_rate", "a positive number", rate)
        function = self.model.partition(":")[2]  # it names a node of the cube, and folders
        if ":" not in self.model:
            check_choice(self.model, MODELS, "model")
        elif not function.isidentifier():
            _require(False, "model", "package.module:function", self.model)
        if self.activation != "relu" and self.model not in RELU_MODELS:
            expected = f"relu for a model other than {', '.join(RELU_MODELS)}"
            _require(False, "activation", expected, self.activation)
        if self.workers > 1 and self.model != "mlp":
            _require(False, "workers", "1 for a model other than the paper's", self.workers)
        _require(
            all(units >= 1 for units in self.hidden), "hidden", "at least 1 unit each", self.hidden
        )

    def rate(self, epoch: int) -> float:
        """Return the learning rate of an epoch (1-based).

        Examples
        --------
        >>> cosine = TrainingConfig(learning_rate=0.4, epochs=4, schedule="cosine")
        >>> [round(cosine.rate(epoch), 3) for epoch in (1, 2, 3, 4)]
        [0.4, 0.341, 0.2, 0.059]
        >>> step = TrainingConfig(learning_rate=0.4, epochs=4, schedule="step")
        >>> [round(step.rate(epoch), 3) for epoch in (1, 2, 3, 4)]
        [0.4, 0.4, 0.04, 0.004]
        """
        elapsed = (epoch - 1) / self.epochs
        if self.schedule == "cosine":
            return self.learning_rate * (1 + math.cos(math.pi * elapsed)) / 2
        if self.schedule == "step":
            return self.learning_rate * 0.1 ** ((elapsed >= 0.5) + (elapsed >= 0.75))
        return self.learning_rate

    def stored_states(self) -> list[int]:
        """Return the states whose parameters are stored: 0 is the start, t after epoch t.

        Examples
        --------
        >>> TrainingConfig(epochs=5, parameters_every=2).stored_states()
        [0, 2, 4, 5]
        """
        if self.parameters_every == 0:
            return []
        return sorted({*range(0, self.epochs + 1, self.parameters_every), self.epochs})


@dataclass(frozen=True, kw_only=True)
class NetworkIdentity:
    """Identity of a user's network; its name `package.module:function` does not identify it."""

    source: str
    """SHA-256 of the source of the modules that define it."""
    parameters: tuple[tuple[str, tuple[int, ...]], ...]
    """Name and shape of each parameter."""
    initial: tuple[tuple[float, ...], ...]
    """Mean, root mean square, first and last value of each parameter, initialised with seed 0."""
    outputs: tuple[tuple[float, ...], ...]
    """Logits of a few training samples at these parameters, in evaluation mode."""

    @property
    def exact(self) -> dict[str, Any]:
        """The part that is equal on every machine; it enters fingerprints."""
        return {"source": self.source, "parameters": self.parameters}

    def differences(self, other: "NetworkIdentity") -> list[str]:
        """Return in words how another network differs from this one.

        Examples
        --------
        >>> network = NetworkIdentity(
        ...     source="0f", parameters=(("0.bias", (2,)),), initial=((1.0,),), outputs=((3.0,),)
        ... )
        >>> import dataclasses
        >>> changed = dataclasses.replace(network, source="1f", outputs=((3.1,),))
        >>> network.differences(changed)
        ['source', 'outputs for the same samples']
        """
        words = ["source"] if self.source != other.source else []
        if self.parameters != other.parameters:
            before, after = dict(self.parameters), dict(other.parameters)
            names = [n for n in {**before, **after} if before.get(n) != after.get(n)]
            changes = [
                f"{name} {_shape_words(after.get(name))}, was {_shape_words(before.get(name))}"
                for name in names[:3]
            ]
            changes += [f"{len(names) - 3} more"] if names[3:] else []
            return [*words, f"parameter shapes ({'; '.join(changes) or 'their order'})"]
        pairs = zip(self.initial, other.initial, strict=True)
        if not all(_nearly_equal(*pair) for pair in pairs):
            words.append("initial values")
        if not _nearly_equal(self.outputs, other.outputs):
            words.append("outputs for the same samples")
        return words

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "NetworkIdentity":
        """Return the identity from JSON, as written from `dataclasses.asdict`."""
        return cls(
            source=value["source"],
            parameters=tuple((name, tuple(shape)) for name, shape in value["parameters"]),
            initial=tuple(map(tuple, value["initial"])),
            outputs=tuple(map(tuple, value["outputs"])),
        )


def _nearly_equal(expected: Any, values: Any) -> bool:
    """Return whether values agree to 1e-4 of the largest; processors differ in their rounding."""
    expected, values = np.asarray(expected), np.asarray(values)
    tolerance = 1e-4 * np.nanmax(np.abs(expected), initial=0)
    return expected.shape == values.shape and np.allclose(
        values, expected, rtol=0, atol=tolerance, equal_nan=True
    )


def _shape_words(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))


@dataclass(frozen=True, kw_only=True)
class TrialConfig:
    """One training run: its data set, batch strategy and seeds."""

    dataset: str
    """Key of the data set, as returned by `sampimp.data.dataset_key`."""
    strategy: str
    """A reference strategy, or one of the paper's seven."""
    seed: int
    """Seed of the initialisation."""
    order_seed: int
    """Seed of the order of the batches."""
    training: TrainingConfig

    def __post_init__(self) -> None:
        """Raise ConfigError for an unknown strategy or a negative seed."""
        check_choice(self.strategy, (*REFERENCES, *STRATEGIES), "strategy")
        for name in ("seed", "order_seed"):
            _require(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))

    def fingerprint(
        self,
        code: str,
        data_digest: str,
        reference_digest: str | None,
        network: NetworkIdentity | None = None,
    ) -> str:
        """Return the SHA-256 that identifies the run's numbers.

        Parameters
        ----------
        code
            Version of this package.
        data_digest
            Digest of the data set's values.
        reference_digest
            Digest of the record that a sorted strategy sorts by; None for the other strategies.
        network
            Identity of a user's own network; None for this package's networks.
        """
        trial = asdict(self)
        # Fields that were added later enter only where they differ from the paper's values, so that
        # trials of the paper keep their fingerprints.
        for name in ("model", "optimizer", "schedule", "activation"):
            if trial["training"][name] == getattr(TrainingConfig, name):
                del trial["training"][name]
        identity = {
            "trial": trial,
            "data": data_digest,
            "reference": reference_digest,
            "code": code,
        }
        if network is not None:
            identity["network"] = network.exact
        return digest_json(identity)

    def trial_id(self, fingerprint: str) -> str:
        """Return the name of the trial's folder, such as mnist-nlo-seed3-1f0c9a2b."""
        return f"{self.dataset}-{self.strategy}-seed{self.seed}-{fingerprint[:8]}"


def check_choice(value: str, choices: Sequence[str], setting: str) -> str:
    """Return the value if it is one of the choices; otherwise suggest the nearest one.

    Parameters
    ----------
    value
        The user's value.
    choices
        The permitted values.
    setting
        Name of the setting, for the message.

    Raises
    ------
    ConfigError
        The value is none of the choices.

    Examples
    --------
    >>> check_choice("nlm", ("nlo", "nlm"), "strategy")
    'nlm'
    """
    if value not in choices:
        nearest = difflib.get_close_matches(value, choices, n=1)
        raise ConfigError(
            expected=f"a {setting} among {', '.join(choices)}",
            got=repr(value),
            where=setting,
            todo=f"did you mean {nearest[0]}?" if nearest else f"choose one of the {len(choices)}",
        )
    return value


def _require(holds: bool, name: str, expected: str, got: Any) -> None:
    """Raise ConfigError for a command-line option unless its condition holds."""
    if not holds:
        raise ConfigError(
            expected=f"{name} to be {expected}",
            got=repr(got),
            where=f"option --{name.replace('_', '-')}",
            todo="change the value",
        )
