"""Snapshot importance: the importance of every sample at fixed parameters.

Snapshot importance is what a sample would have if each sample's gradient were taken at the same
parameters, in evaluation mode. It is not the in-step importance of `ImportanceRecorder`, and the
two are never mixed.

Map: `snapshot_importance`, `forward_layers` (names of the layers in forward order).
"""

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional

from sampimp.importance.evaluation import evaluation_mode
from sampimp.importance.step import Capture


def forward_layers(model: nn.Module, inputs: Tensor) -> tuple[str, ...]:
    """Return the names of a model's layers in the order in which a forward pass calls them.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> forward_layers(model, torch.zeros(1, 2))
    ('0', '2')
    """
    capture = Capture(model)
    with capture.step([len(inputs)]):
        model(inputs)
    return tuple(capture.layers[i] for i in capture.tensors.forward_order)


def snapshot_importance(
    model: nn.Module, inputs: Tensor, labels: Tensor, *, rate: float, chunk: int = 1000
) -> Tensor:
    """Return the importance that every sample would have at the model's present parameters.

    The loss is cross-entropy. The model is set to evaluation mode during the call. Dropout is then
    off, and a BatchNorm uses its running statistics and mixes no samples; a BatchNorm without
    them is refused.

    Parameters
    ----------
    model
        As for `ImportanceRecorder`. Its parameters, gradients and `training` flags are left as they
        are.
    inputs, labels
        Shapes (N, ...) and (N,).
    rate
        Factor from a sample's own gradient to its part of the update: learning rate / batch size
        under a mean loss.
    chunk
        Samples in one pass. It limits memory and changes no result, since samples do not
        affect each other. The default is arbitrary.

    Returns
    -------
    Tensor of shape (layer, N)
        In parameter squared, on the CPU, in the model's precision; layers in forward order.
    """
    has_recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    # cuDNN has a backward pass of recurrent layers only in training mode.
    kernels = torch.backends.cudnn.flags(enabled=False) if has_recurrent else nullcontext()
    with evaluation_mode(model), kernels:
        capture = Capture(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        rates = {id(parameter): float(rate) for parameter in trained}
        for inputs_N, labels_N in zip(inputs.split(chunk), labels.split(chunk), strict=True):
            with capture.step([len(labels_N)], accumulates=False):
                loss = functional.cross_entropy(model(inputs_N), labels_N, reduction="sum")
                torch.autograd.grad(loss, trained)
            capture.finish(rates)
            capture.norms.accept()
    return capture.norms.take()[capture.tensors.forward_order]
