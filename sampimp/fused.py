"""One training step of a stack of linear layers, written out: forward, backward, update, norms.

For layers d = 1 .. D, x_1 the batch, W_d and b_d the weights and biases:

    x_{d+1} = relu(x_d W_d^T + b_d), without the relu after the last layer
    delta_D = d(mean loss)/d(logits), the softmax in float64
    for d = D .. 1:
        keep |x_d| and |delta_d| of every sample (`sampimp.importance` needs nothing else)
        delta_{d-1} = (delta_d W_d) where x_d > 0
        W_d -= rate (delta_d^T x_d + decay W_d), b_d likewise

Where several workers share a batch, delta_d^T x_d is summed over them before the update; the mean
of the loss is over the whole batch in any case.

These are the very operations that autograd and `torch.optim.SGD` carry out on such a network, in
the same order, so that the parameters are theirs bit for bit (a test says so). What is saved is
autograd's own work, and the memory: gradients and activations stay where they are from step to
step, where autograd takes fresh pages for several megabytes. With the norms in it, a step took 0.92
times the plain one at 784 inputs and 0.75 times at 3,072 (`make bench`).

Shape suffixes: N samples of a batch, I inputs and O outputs of a layer, C classes.
"""

from typing import Any

import torch
from torch import Tensor, nn

from sampimp.capture import NormBuffer
from sampimp.errors import UnsupportedError
from sampimp.importance import linear_importance, row_norm
from sampimp.workers import ALONE, Workers

aten = torch.ops.aten


class FusedStep:
    """Train a stack of linear layers by plain SGD on the mean cross-entropy, and record.

    Parameters
    ----------
    model
        Linear layers with a ReLU between each two, perhaps after a Flatten, all of them trained.
    learning_rate, weight_decay
        Of `torch.optim.SGD`.
    record
        False leaves the norms out, and with them importance; the parameters are the same.
    workers
        Who else computes a share of each batch, from the same parameters.

    Raises
    ------
    UnsupportedError
        The model is no such stack.
    """

    def __init__(
        self,
        model: nn.Sequential,
        *,
        learning_rate: float,
        weight_decay: float,
        record: bool,
        workers: Workers = ALONE,
    ) -> None:
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self._workers = workers
        layers = _require_stack(model)
        self._weights = [layer.weight.detach() for layer in layers]
        self._biases = [layer.bias.detach() for layer in layers]
        # Each a tensor of its own: MKL's last bit depends on where a matrix starts in memory. As
        # views of one buffer, 3 % of small random networks came out other than autograd's.
        self._weight_gradients = [torch.empty_like(weight) for weight in self._weights]
        self._bias_gradients = [torch.empty_like(bias) for bias in self._biases]
        self._outputs = [weight.new_empty(0, len(weight)) for weight in self._weights]
        self._norms = NormBuffer(2 * len(layers)) if record else None  # of activations, of deltas

    @torch.no_grad()
    def __call__(self, inputs: Tensor, labels: Tensor, batch_size: int | None = None) -> None:
        """Train on one batch: inputs [N, ...], labels [N].

        `batch_size` is that of the whole batch where these samples are this worker's share of it,
        which may be none.
        """
        activations = self._forward(inputs.flatten(1))
        logits_NC = activations.pop()
        self._backward(activations, loss_gradient(logits_NC, labels, batch_size))
        if self._norms is not None:
            self._norms.accept(len(labels), [self.learning_rate])
        gradients = [*self._weight_gradients, *self._bias_gradients]
        self._workers.sum(gradients)
        for parameter, gradient in zip([*self._weights, *self._biases], gradients, strict=True):
            if self.weight_decay:  # as torch.optim.SGD: to add nothing can turn a -0.0 into 0.0
                gradient.add_(parameter, alpha=self.weight_decay)
            parameter.add_(gradient, alpha=-self.learning_rate)

    def take(self) -> Tensor | None:
        """Return beta (layer, samples) of the steps since the last call; None if not recorded."""
        if self._norms is None:
            return None
        norms_LN, rates_1N = self._norms.take()
        activation_norm_LN, delta_norm_LN = norms_LN.chunk(2)
        return linear_importance(delta_norm_LN, activation_norm_LN, rates_1N, rates_1N)

    def state(self) -> dict[str, Any]:
        """Return what the next step depends on beside the parameters: nothing."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""

    def _forward(self, inputs_NI: Tensor) -> list[Tensor]:
        """Return each layer's input, and the logits."""
        size = len(inputs_NI)
        if size > len(self._outputs[0]):
            self._outputs = [output.new_empty(size, output.shape[1]) for output in self._outputs]
        activations = [inputs_NI]
        last = len(self._weights) - 1
        for position, (weight_OI, bias_O) in enumerate(
            zip(self._weights, self._biases, strict=True)
        ):
            output_NO = self._outputs[position][:size]
            torch.addmm(bias_O, activations[-1], weight_OI.t(), out=output_NO)
            activations.append(output_NO if position == last else output_NO.relu_())
        return activations

    def _backward(self, activations: list[Tensor], delta_NO: Tensor) -> None:
        """Fill the gradients, from the last layer to the first, and note the norms."""
        depth = len(self._weights)
        rows = None if self._norms is None else self._norms.rows(len(delta_NO), delta_NO).unbind()
        for position in reversed(range(depth)):
            activation_NI = activations[position]
            if rows is not None:
                row_norm(activation_NI, out=rows[position])
                row_norm(delta_NO, out=rows[depth + position])
            torch.mm(delta_NO.t(), activation_NI, out=self._weight_gradients[position])
            torch.sum(delta_NO, 0, out=self._bias_gradients[position])
            if position:
                delta_NI = delta_NO @ self._weights[position]
                delta_NO = aten.threshold_backward(delta_NI, activation_NI, 0)


def loss_gradient(logits_NC: Tensor, labels_N: Tensor, batch_size: int | None = None) -> Tensor:
    """Return the gradient of the batch's mean cross-entropy at the logits, shape (N, C).

    The mean is over `batch_size` samples, by default over these.

    The softmax is taken in float64: its gradient p - 1 of a confident sample cancels in float32,
    and by epoch 40 of MNIST the importance of half the samples was rounding (replayed in float64:
    42 % off at the median, against 4e-6 so).

    Examples
    --------
    >>> loss_gradient(torch.zeros(1, 4), torch.tensor([2]))
    tensor([[ 0.2500,  0.2500, -0.7500,  0.2500]])
    """
    log_softmax_NC = torch.log_softmax(logits_NC.double(), 1)
    mean = 1  # ATen's number for the reduction
    count = log_softmax_NC.new_full((), len(labels_N) if batch_size is None else batch_size)
    one = log_softmax_NC.new_ones(())
    gradient_NC = aten.nll_loss_backward(one, log_softmax_NC, labels_N, None, mean, -100, count)
    delta_NC = aten._log_softmax_backward_data(gradient_NC, log_softmax_NC, 1, torch.float64)
    return delta_NC.to(logits_NC.dtype)


def _require_stack(model: nn.Sequential) -> list[nn.Linear]:
    modules = [module for module in model if not isinstance(module, nn.Flatten)]
    layers = [module for module in modules[::2] if type(module) is nn.Linear]
    activations = [module for module in modules[1::2] if type(module) is nn.ReLU]
    if (
        len(layers) != len(activations) + 1
        or len(layers) + len(activations) != len(modules)
        or any(layer.bias is None for layer in layers)
    ):
        raise UnsupportedError(
            expected="Linear layers with biases and a ReLU between each two",
            got=", ".join(type(module).__name__ for module in modules) or "no layer",
            where="the model of the training run",
            todo="train it in a loop of its own, with ImportanceRecorder around the step",
        )
    return layers
