"""Capture importance inside a training step, with hooks, and leave the training as it is.

At each linear layer a forward hook notes the layer's input and a hook on its output receives the
gradient there; `sampimp.importance` needs nothing else. The hooks exist only inside the step, read
and never write what autograd computes, and so leave the trained parameters bit-identical. A layer
or an optimizer without an exact formula here is refused when the recorder is made.

Map: `NormBuffer` (what a pass leaves behind), `LayerCapture` (the hooks), `ImportanceRecorder`
(in-step, for anybody's loop), `snapshot_importance` (every sample at fixed parameters).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.nn import functional

from sampimp.errors import ConfigError, UnsupportedError
from sampimp.importance import linear_importance, row_norm
from sampimp.schema import SCHEMA_VERSION, VARIABLES, __version__

if TYPE_CHECKING:
    import xarray as xr


class NormBuffer:
    """What passes leave until importance is formed: each sample's two norms in every layer.

    One buffer is kept and grows: thousands of small tensors between the large ones of autograd
    scattered its memory, and page faults then took up to 10 % of a step.

    Parameters
    ----------
    layer_count
        Number of layers, L.
    """

    def __init__(self, layer_count: int) -> None:
        self._buffer = torch.empty(2, layer_count, 0)  # activation and delta, layer, sample
        self._filled = 0
        self._rates: list[tuple[int, list[float]]] = []  # batch size; rates of weights and biases

    def rows(self, size: int, like: Tensor) -> tuple[Tensor, ...]:
        """Return where a pass over `size` samples writes: L activation norms, then L of delta."""
        end, room = self._filled + size, self._buffer.shape[2]
        if end > room or like.dtype != self._buffer.dtype or like.device != self._buffer.device:
            larger = like.new_empty(*self._buffer.shape[:2], max(2 * room, end))
            larger[:, :, :room] = self._buffer
            self._buffer = larger
        # All at once: eight slices taken one by one cost 20 microseconds more.
        return self._buffer[:, :, self._filled : end].flatten(0, 1).unbind()

    def accept(self, size: int, rates: list[float]) -> None:
        """Keep the pass that was written, whose update had these rates: weights', then biases'."""
        self._rates.append((size, rates))
        self._filled += size

    def take(self) -> Tensor:
        """Return beta of all passes since the last call, one after the other; forget them.

        Returns
        -------
        Tensor of shape (layer, samples)
            On the CPU.
        """
        activation_norm_LN, delta_norm_LN = self._buffer[:, :, : self._filled].cpu()
        sizes = torch.tensor([size for size, _ in self._rates])
        rates = torch.tensor([rates for _, rates in self._rates], dtype=self._buffer.dtype)
        weight_rate_LN, bias_rate_LN = rates.repeat_interleave(sizes, 0).T.chunk(2)
        self._filled = 0
        self._rates = []
        return linear_importance(delta_norm_LN, activation_norm_LN, weight_rate_LN, bias_rate_LN)


class LayerCapture:
    """The importance of batches in every layer, from one forward and backward pass each.

    Parameters
    ----------
    model
        Its parameters must all belong to `nn.Linear` layers, each called once in a pass.
    rate_of
        The learning rate of a parameter; 0 where it is not trained, or None.
    after_backward
        Called when a backward pass is over.

    Raises
    ------
    UnsupportedError
        A module with parameters is not linear, shares them, or mixes the samples of a batch.
    """

    def __init__(
        self,
        model: nn.Module,
        rate_of: Callable[[Tensor | None], float],
        after_backward: Callable[[], None] | None = None,
    ) -> None:
        self._after_backward = after_backward
        self._modules = find_layers(model)
        self._rate_of = rate_of
        self._norms = NormBuffer(len(self._modules))
        self._size = 0
        self._views: tuple[Tensor, ...] = ()
        self._announced = False  # whether `after_backward` is to be called in this pass
        self._forward: dict[str, None] = {}  # layers seen in this pass, in the order of the pass
        self._backward: set[str] = set()
        self._order: tuple[str, ...] = tuple(self._modules)

    @contextmanager
    def batch(self, size: int) -> Iterator[None]:
        """Watch the pass over `size` samples that is run inside."""
        self._size = size
        self._views = ()
        self._announced = False
        self._forward = {}
        self._backward = set()
        handles = [
            layer.register_forward_hook(partial(self._on_forward, position, name), with_kwargs=True)
            for position, (name, layer) in enumerate(self._modules.items())
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def rates(self) -> list[float]:
        """Return the present learning rates of the layers' weights, then of their biases."""
        layers = self._modules.values()
        weights = [self._rate_of(layer.weight) for layer in layers]
        return weights + [self._rate_of(layer.bias) for layer in layers]

    def accept(self, rates: list[float]) -> None:
        """Keep the pass that was watched, whose update had these rates.

        Raises
        ------
        UnsupportedError
            A layer saw no gradient in it.
        """
        missing = [name for name in self._modules if name not in self._backward]
        if missing:
            raise UnsupportedError(
                expected="a forward and a backward pass through every layer in the step",
                got=f"no gradient at {', '.join(missing)}",
                where=f"layer {missing[0]}",
                todo="put the whole step (forward, backward, update) inside the block, and train "
                "without layers that a pass leaves out",
            )
        self._order = tuple(self._forward)
        self._norms.accept(self._size, rates)

    def take(self) -> tuple[tuple[str, ...], Tensor]:
        """Return the layers in forward order, and beta as `NormBuffer.take` in that order."""
        beta_LN = self._norms.take()
        registered = list(self._modules)
        return self._order, beta_LN[[registered.index(name) for name in self._order]]

    def _on_forward(
        self,
        position: int,
        name: str,
        layer: nn.Linear,
        inputs: tuple[Tensor, ...],
        keywords: dict[str, Tensor],
        output: Tensor,
    ) -> None:
        if not torch.is_grad_enabled():
            return  # an evaluation inside the step
        activation = inputs[0] if inputs else keywords["input"]
        if activation.dim() != 2 or len(activation) != self._size:
            raise UnsupportedError(
                expected=f"an input of shape ({self._size}, inputs), one row a sample",
                got=f"an input of shape {tuple(activation.shape)}",
                where=f"layer {name}",
                todo="name as many samples as the batch has rows; sequences are not supported",
            )
        if name in self._forward:
            raise UnsupportedError(
                expected="every layer to be used once in a step",
                got="a second use",
                where=f"layer {name}",
                todo="give every use a layer of its own, and every backward pass a step",
            )
        self._forward[name] = None
        # At once, and not with the gradient: to hold the input until then cost 1 % of a step.
        row_norm(activation.detach(), out=self._rows(activation)[position])
        if output.requires_grad:
            output.register_hook(partial(self._on_gradient, position, name))
        else:  # frozen, and all below it too
            self._backward.add(name)
            self._rows(activation)[len(self._modules) + position].zero_()

    def _on_gradient(self, position: int, name: str, delta_NO: Tensor) -> None:
        if name in self._backward:
            raise UnsupportedError(
                expected="one backward pass in a step",
                got="a second gradient",
                where=f"layer {name}",
                todo="add the losses up before backward()",
            )
        if self._after_backward is not None and not self._announced:
            self._announced = True
            # As data-parallel training does: one call instead of a hook on each parameter.
            Variable._execution_engine.queue_callback(self._after_backward)
        self._backward.add(name)
        row_norm(delta_NO, out=self._rows(delta_NO)[len(self._modules) + position])

    def _rows(self, like: Tensor) -> tuple[Tensor, ...]:
        """Return the buffer's rows for this pass."""
        if not self._views:
            self._views = self._norms.rows(self._size, like)
        return self._views


def find_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the layers of a model by name, in the order in which they were registered.

    Raises
    ------
    UnsupportedError
        As for `LayerCapture`.

    Examples
    --------
    >>> find_layers(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))).keys()
    dict_keys(['0', '2'])
    """
    layers: dict[str, nn.Linear] = {}
    owner: dict[int, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            raise UnsupportedError(
                expected="layers that treat each sample of a batch on its own",
                got=f"{type(module).__name__}, which mixes them",
                where=f"module {name or '(the model itself)'}",
                todo="train without it: no importance of a single sample is defined below it",
            )
        own = list(module.parameters(recurse=False))
        if not own:
            continue
        # Weight and spectral norm and pruning put a computed tensor in the weight's place.
        if type(module) is not nn.Linear or not isinstance(module.weight, nn.Parameter):
            raise UnsupportedError(
                expected="layers of type Linear whose weight is a parameter",
                got=f"{type(module).__name__} with {', '.join(dict(module.named_parameters()))}",
                where=f"module {name or '(the model itself)'}",
                todo="only Linear has an exact rule here; replace the module or train without it",
            )
        for parameter in own:
            if id(parameter) in owner:
                raise UnsupportedError(
                    expected="every parameter to belong to one layer",
                    got=f"one shared with {owner[id(parameter)]}",
                    where=f"module {name}",
                    todo="untie the weights: their gradients add up before they are squared",
                )
            owner[id(parameter)] = name
        layers[name or "model"] = module
    if not layers:
        raise UnsupportedError(
            expected="a model with at least one Linear layer",
            got=f"{type(model).__name__} without parameters",
            where="the model given to the recorder",
            todo="pass the model that is being trained",
        )
    return layers


class ImportanceRecorder:
    """Record in-step importance around anybody's training step.

    Parameters
    ----------
    model
        A network whose parameters all belong to `nn.Linear` layers.
    optimizer
        `torch.optim.SGD` without momentum, over any groups of its parameters.
    loss_reduction
        How the loss is taken over a batch, "mean" or "sum". The gradients already contain it; it is
        written beside the result, because importance differs by B^2 between the two.

    Raises
    ------
    UnsupportedError
        On construction for a layer or optimizer without an exact rule; in a step for gradients
        changed between `backward` and `optimizer.step`, as by clipping.

    References
    ----------
    Gao & Jojic (2017), section 2. See Also: GraNd = sqrt(sum over layers of importance) B / rate.

    Examples
    --------
    Three lines are added to a loop, here marked with their number:

    >>> inputs, labels = torch.randn(6, 4), torch.randint(0, 3, (6,))
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> recorder = ImportanceRecorder(model, optimizer)                        # 1
    >>> for epoch in (1, 2):
    ...     for index in torch.randperm(6).split(3):
    ...         with recorder.step(index, epoch=epoch):                        # 2
    ...             optimizer.zero_grad()
    ...             loss = functional.cross_entropy(model(inputs[index]), labels[index])
    ...             loss.backward()
    ...             optimizer.step()
    >>> dict(recorder.to_dataset().sizes)                                      # 3
    {'epoch': 2, 'layer': 2, 'sample': 6}
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, loss_reduction: str = "mean"
    ) -> None:
        if loss_reduction not in ("mean", "sum"):
            raise ConfigError(
                expected='loss_reduction "mean" or "sum"',
                got=repr(loss_reduction),
                where="ImportanceRecorder",
                todo="name the reduction of the loss that is trained on",
            )
        check_optimizer(optimizer)
        self.optimizer = optimizer
        self.loss_reduction = loss_reduction
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(p.requires_grad and id(p) in known for p in model.parameters()):
            raise UnsupportedError(
                expected="an optimizer over parameters of the model",
                got="none that it trains",
                where="ImportanceRecorder",
                todo="make the optimizer from this model's parameters",
            )
        self._rates: dict[int, float] = {}  # by the parameter's id, at the last update
        self._capture = LayerCapture(model, self._rate_of, self._note_gradients)
        self._parameters = list(model.parameters())
        self._noted: list[tuple[int, int] | None] = []
        self._epoch: int | None = None
        self._indices: list[Tensor] = []  # of the steps of this epoch since the last flush
        self._parts: dict[int, list[tuple[Tensor, Tensor]]] = {}  # by epoch: indices and beta
        self._largest_batch = 0
        self.layers: tuple[str, ...] = tuple(find_layers(model))
        """Names of the layers, in forward order once a step was recorded."""

    @contextmanager
    def step(self, index: Tensor | np.ndarray | Sequence[int], *, epoch: int) -> Iterator[None]:
        """Record the training step run inside the block.

        Parameters
        ----------
        index
            Permanent index of each sample of the batch, shape (N,), in the order of its rows.
        epoch
            The epoch that the step belongs to. A sample used twice in it has its importance summed.

        Raises
        ------
        ConfigError
            An index appears twice or is negative.
        UnsupportedError
            As for the class, or the block makes no update or more than one.
        """
        index_N = check_index(index)
        rates: list[list[float]] = []

        def before_update(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            check_optimizer(optimizer)
            self._check_gradients(epoch)
            self._rates = {
                id(parameter): float(group["lr"])
                for group in optimizer.param_groups
                for parameter in group["params"]
                if parameter.requires_grad
            }
            rates.append(self._capture.rates())

        if epoch != self._epoch:
            self._flush()
            self._epoch = epoch
        self._noted = []
        handle = self.optimizer.register_step_pre_hook(before_update)
        try:
            with self._capture.batch(len(index_N)):
                yield
        finally:
            handle.remove()
        if len(rates) != 1:
            raise UnsupportedError(
                expected="one optimizer.step() in the block",
                got=f"{len(rates)}",
                where=f"epoch {epoch}",
                todo="put exactly one update into the block; do not accumulate gradients",
            )
        self._capture.accept(rates[0])
        self._indices.append(index_N)
        self._largest_batch = max(self._largest_batch, len(index_N))

    def pop_epoch(self, epoch: int, sample_count: int) -> Tensor:
        """Return an epoch's importance on the CPU and forget it.

        Returns
        -------
        Tensor of shape (layer, sample)
            NaN for a sample that no step of the epoch used.
        """
        self._flush()
        return self._summed(self._parts.pop(epoch), sample_count)

    def _flush(self) -> None:
        """Turn the norms of the steps so far into importance."""
        if self._indices and self._epoch is not None:
            self.layers, beta_LN = self._capture.take()
            part = torch.cat(self._indices), beta_LN
            self._parts.setdefault(self._epoch, []).append(part)
            self._indices = []

    def to_dataset(self, sample_count: int | None = None) -> "xr.Dataset":
        """Return what was recorded, labelled.

        Parameters
        ----------
        sample_count
            Size of the training set; by default the largest index seen, plus one.

        Returns
        -------
        xarray.Dataset
            `importance` (epoch, layer, sample), float32, in parameter squared; NaN where an epoch
            did not use a sample. `to_zarr` of the Dataset writes it to disk.
        """
        import xarray as xr  # here: recording alone should not cost the import

        self._flush()
        epochs = sorted(self._parts)
        if sample_count is None:
            largest = [int(index.max()) for epoch in epochs for index, _ in self._parts[epoch]]
            sample_count = 1 + max(largest, default=-1)
        values = [
            self._summed(self._parts[epoch], sample_count).float().numpy() for epoch in epochs
        ]
        variable = VARIABLES["importance"]
        rates = sorted({group["lr"] for group in self.optimizer.param_groups})
        return xr.Dataset(
            {
                "importance": (
                    variable.dims,
                    np.stack(values) if values else np.empty((0, len(self.layers), sample_count)),
                    {
                        "units": variable.units,
                        "long_name": variable.long_name,
                        "learning_rate": rates[0] if len(rates) == 1 else rates,
                        "batch_size": self._largest_batch,
                        "loss_reduction": self.loss_reduction,
                        "weight_decay": self.optimizer.param_groups[0]["weight_decay"],
                        "optimizer": type(self.optimizer).__name__,
                    },
                )
            },
            coords={
                "epoch": epochs,
                # As objects: Zarr 3 has no specification of strings of a fixed length, and warns.
                "layer": np.array(self.layers, dtype=object),
                "sample": np.arange(sample_count),
            },
            attrs={"schema_version": SCHEMA_VERSION, "sampimp_version": __version__},
        )

    @staticmethod
    def _summed(parts: Sequence[tuple[Tensor, Tensor]], sample_count: int) -> Tensor:
        indices, betas = zip(*parts, strict=True)
        return sum_by_sample(torch.cat(indices), torch.cat(betas, dim=1), sample_count)

    def _rate_of(self, parameter: Tensor | None) -> float:
        return self._rates.get(id(parameter), 0.0)

    def _note_gradients(self) -> None:
        """Note the gradients as backward() leaves them, to know them again at the update."""
        self._noted = [_identity(parameter) for parameter in self._parameters]

    def _check_gradients(self, epoch: int) -> None:
        """Raise UnsupportedError unless the gradients are those of this step's backward pass."""
        for number, parameter in enumerate(self._parameters):
            if number >= len(self._noted) or _identity(parameter) != self._noted[number]:
                raise UnsupportedError(
                    expected="the gradients of this step's backward pass, unchanged",
                    got="gradients changed between backward() and optimizer.step(), or none",
                    where=f"epoch {epoch}, parameter {number} of model.parameters()",
                    todo="train without gradient clipping, scaling, accumulation or a closure: the "
                    "recorded update would not be the one that is made",
                )


def _identity(parameter: Tensor) -> tuple[int, int] | None:
    """Return what tells a gradient from another one, and from itself after a change in place."""
    grad = parameter.grad
    return None if grad is None else (id(grad), grad._version)


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raise UnsupportedError unless the update is -rate (gradient + weight decay)."""
    momentum = [group.get("momentum", 0) for group in optimizer.param_groups]
    if type(optimizer) is not torch.optim.SGD or any(momentum):
        raise UnsupportedError(
            expected="torch.optim.SGD without momentum",
            got=f"{type(optimizer).__name__}" + (f", momentum {momentum}" if any(momentum) else ""),
            where="ImportanceRecorder",
            todo="use plain SGD: the affectibility of another update has another formula",
        )


def check_index(index: Tensor | np.ndarray | Sequence[int]) -> Tensor:
    """Return sample indices as an int64 tensor on the CPU, or raise ConfigError."""
    index_N = torch.as_tensor(index, dtype=torch.int64).cpu()
    listed = index_N.flatten().tolist()  # a set of ints takes a quarter of the time of a sort
    if index_N.dim() != 1 or len(set(listed)) != len(listed) or min(listed, default=0) < 0:
        raise ConfigError(
            expected="one non-negative index for each sample of the batch, none twice",
            got=f"shape {tuple(index_N.shape)}, smallest {min(listed, default=0)}, "
            f"{len(listed) - len(set(listed))} repeated",
            where="ImportanceRecorder.step",
            todo="pass the samples' positions in the training set",
        )
    return index_N


def snapshot_importance(
    model: nn.Module, inputs: Tensor, labels: Tensor, *, rate: float, chunk: int = 1000
) -> Tensor:
    """Return the importance that every sample would have at the model's present parameters.

    Parameters
    ----------
    model
        As for `LayerCapture`; left as it is, gradients too.
    inputs, labels
        Shapes (N, ...) and (N,).
    rate
        The factor from a sample's own gradient to its part of the update, learning rate / batch
        size under a mean loss.
    chunk
        Samples in one pass; a matter of memory (arbitrary), each sample's gradient being its own.

    Returns
    -------
    Tensor of shape (layer, N)
        On the CPU, in the model's precision.
    """
    capture = LayerCapture(model, lambda p: rate if p is not None and p.requires_grad else 0.0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for inputs_N, labels_N in zip(inputs.split(chunk), labels.split(chunk), strict=True):
        with capture.batch(len(labels_N)):
            loss = functional.cross_entropy(model(inputs_N), labels_N, reduction="sum")
            torch.autograd.grad(loss, trained)
        capture.accept(capture.rates())
    return capture.take()[1]


def sum_by_sample(index_N: Tensor, beta_LN: Tensor, sample_count: int) -> Tensor:
    """Sum each sample's importance over an epoch, shape (layer, sample); NaN where unused."""
    total = torch.zeros(len(beta_LN), sample_count, dtype=beta_LN.dtype)
    total.index_add_(1, index_N, beta_LN)
    unused = torch.ones(sample_count, dtype=torch.bool)
    unused[index_N] = False
    total[:, unused] = torch.nan
    return total
