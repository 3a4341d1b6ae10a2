"""Tensors of a model that depend on no sample: parameters, buffers, and tensors derived from them.

A parameter may be reshaped, tied, normalised or added to another one before samples are involved.
Every tensor that is derived only from parameters and buffers is therefore noted with its *roots*,
the trained parameters from which it was computed. A tensor without a note *varies*: it depends on
the samples of the batch. Notes are kept beside the tensors, which may be saved or copied.

Map: `ModelTensors` (parameters by row, their layers, roots of tensors), `require_recordable`
(models that cannot be recorded), `samples_mixed_by` (the error for BatchNorm).
"""

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from sampimp.errors import UnsupportedError

NO_ROOTS: frozenset[int] = frozenset()
"""Roots of a tensor that is derived from no trained parameter."""


class ModelTensors:
    """Parameters and buffers of a model, and the roots of tensors derived from them.

    A *row* is the position of a parameter in `model.parameters()`.

    Parameters
    ----------
    model
        The network to be recorded.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        named = list(model.named_parameters())
        self.parameters = [parameter for _, parameter in named]
        self.rows = {id(parameter): row for row, parameter in enumerate(self.parameters)}
        """Row of each parameter, by its id."""
        self._owners = [name.rpartition(".")[0] or "model" for name, _ in named]
        self.owner_of = dict(zip(self.rows, self._owners, strict=True))
        """Name of each parameter's layer, by the parameter's id."""
        self.layers = tuple(dict.fromkeys(self._owners))
        """Names of the layers, in the order of registration."""
        self.layer_of_row = torch.tensor([self.layers.index(owner) for owner in self._owners])
        self.called: dict[str, None] = {}
        """Names of the layers that were called, in the order of their first calls."""
        self.derived: WeakIdKeyDictionary = WeakIdKeyDictionary()
        """Roots of tensors that are derived from parameters and buffers, by tensor."""
        self.find_buffers()

    def find_buffers(self) -> None:
        """Collect the parameters and the present buffers, which a model may replace."""
        self._buffers = list(self.model.buffers())  # kept, so that no other tensor gets their ids
        self.fixed = {id(buffer): NO_ROOTS for buffer in self._buffers}
        """Roots of parameters and buffers, by id."""
        self.fixed |= {key: frozenset((row,)) for key, row in self.rows.items()}

    def require_same_parameters(self) -> None:
        """Raise UnsupportedError if the model has gained, lost or replaced parameters."""
        if list(map(id, self.model.parameters())) != list(map(id, self.parameters)):
            raise UnsupportedError(
                expected=f"the {len(self.parameters)} parameters that the recorder was made with",
                got=f"{len(list(self.model.parameters()))} parameters, or some that were replaced",
                where="the model",
                todo="make the recorder when the model has all its layers",
            )

    def roots(self, tensor: Tensor) -> frozenset[int] | None:
        """Return the rows of the trained parameters behind a tensor; None if it varies."""
        roots = self.fixed.get(id(tensor))
        if roots is None:
            roots = self.derived.get(tensor)
            if roots is None:
                return None
        return roots if tensor.requires_grad else NO_ROOTS

    def forget(self, value: object) -> bool:
        """Let a tensor vary from now on; return whether it had roots."""
        return isinstance(value, Tensor) and self.derived.pop(value, None) is not None

    def varies(self, value: object) -> bool:
        """Return whether a value is a tensor that depends on the samples."""
        return isinstance(value, Tensor) and self.roots(value) is None

    def is_fixed(self, tensor: Tensor) -> bool:
        """Return whether a tensor is a parameter or a buffer, or a view of one."""
        return id(tensor) in self.fixed or id(tensor._base) in self.fixed

    @property
    def forward_order(self) -> list[int]:
        """Positions of the layers in the order of their first calls; uncalled layers come last."""
        rank = {name: number for number, name in enumerate(self.called)}
        positions = range(len(self.layers))
        return sorted(positions, key=lambda i: rank.get(self.layers[i], len(rank)))

    def place(self, row: int) -> str:
        """Return the name of a parameter for messages."""
        return f"layer {self._owners[row]}, parameter of shape {tuple(self.parameters[row].shape)}"


_WRAPPERS = {"DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"}


def samples_mixed_by(operation: str, where: str) -> UnsupportedError:
    """Return the error for an operation that mixes the samples of a batch."""
    return UnsupportedError(
        expected="operations that treat each sample of a batch on its own",
        got=f"{operation}, which mixes samples: layers below it have no per-sample gradients",
        where=where,
        todo="replace it (GroupNorm, LayerNorm), put it into eval mode, or record only the layers "
        'above it: batch_norm="undefined"',
    )


def nested_samples(where: str) -> UnsupportedError:
    """Return the error for samples of several lengths in one nested tensor."""
    return UnsupportedError(
        expected="samples on an axis of a tensor",
        got="a nested tensor",
        where=where,
        todo="pad the samples before the block: samples.to_padded_tensor(0.0)",
    )


def require_recordable(model: nn.Module, batch_norm: str) -> None:
    """Raise UnsupportedError for a wrapped, compiled or scripted model, or a refused BatchNorm."""
    for name, module in model.named_modules():
        where = f"module {name}" if name else "the model itself"
        if type(module).__name__ in _WRAPPERS:
            raise UnsupportedError(
                expected="a model that is trained by one process on one device",
                got=type(module).__name__,
                where=where,
                todo="train without it; a study of the paper's network has --workers-per-trial",
            )
        if isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl:
            raise UnsupportedError(
                expected="a model whose operations are called one by one",
                got="a compiled model",
                where=where,
                todo="record the model that was passed to torch.compile",
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedError(
                expected="a model whose operations are called one by one",
                got="a scripted model",
                where=where,
                todo="record the model from which the script was made",
            )
        mixes_samples = isinstance(module, nn.modules.batchnorm._BatchNorm) and (
            module.training or not module.track_running_stats
        )
        if mixes_samples and batch_norm == "refuse":
            raise samples_mixed_by(type(module).__name__, where)
