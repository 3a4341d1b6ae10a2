"""One training step of a stack of linear layers, written out, with its importance.

For layers d = 1 .. D, x_1 the batch, W_d and b_d the weights and biases:

    x_{d+1} = relu(x_d W_d^T + b_d), without the relu after the last layer
    delta_D = d(mean loss)/d(logits), the softmax in float64
    for d = D .. 1:
        the gradients of W_d and b_d are delta_d^T x_d and the sum of delta_d
        delta_{d-1} = (delta_d W_d) where x_d > 0
    the optimizer's step
    for d = 1 .. D: importance from x_d, delta_d and the derivative of the update

Where several workers share a batch, the gradients are summed over them before the update; the mean
of the loss is over the whole batch in any case.

These are the very operations that autograd carries out on such a network, in the same order, so
that the parameters are its own bit for bit (a test says so). What is saved is autograd's own work,
and the memory: gradients and activations stay where they are from step to step, where autograd
takes fresh pages for several megabytes. What it takes is in `benchmarks/` (`make bench`).

Shape suffixes: N samples of a batch, I inputs and O outputs of a layer, C classes.
"""

import torch
from torch import Tensor, nn

from sampimp.errors import UnsupportedError
from sampimp.importance.gradients import Explicit, Product, squares
from sampimp.importance.optimizers import Diagonal, UpdateDerivative
from sampimp.importance.recorder import NormBuffer
from sampimp.training.collective import ALONE, Workers

aten = torch.ops.aten


class FusedStep:
    """Train a stack of linear layers on the mean cross-entropy, and record.

    Parameters
    ----------
    model
        Linear layers with a ReLU between each two, perhaps after a Flatten, all of them trained.
    optimizer
        Over all parameters of the model; see `sampimp.importance.optimizers` for those that can be
        recorded.
    record
        False leaves importance out; the parameters are the same.
    workers
        Who else computes a share of each batch, from the same parameters.

    Raises
    ------
    UnsupportedError
        The model is no such stack, or the optimizer has no rule.
    """

    def __init__(
        self,
        model: nn.Sequential,
        optimizer: torch.optim.Optimizer,
        *,
        record: bool,
        workers: Workers = ALONE,
    ) -> None:
        self._optimizer, self._workers = optimizer, workers
        self._layers = _require_stack(model)
        self._parameters = list(model.parameters())
        trained = {id(one) for group in optimizer.param_groups for one in group["params"]}
        if not all(one.requires_grad and id(one) in trained for one in self._parameters):
            raise UnsupportedError(
                expected="an optimizer over all parameters of the model, none of them frozen",
                got="one that leaves some out, or a frozen one",
                where="the written-out step",
                todo="train it in a loop of its own, with ImportanceRecorder around the step",
            )
        # Each a tensor of its own: MKL's last bit depends on where a matrix starts in memory. As
        # views of one buffer, 3 % of small random networks came out other than autograd's.
        self._gradients = [torch.empty_like(parameter) for parameter in self._parameters]
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        self._outputs = [layer.weight.new_empty(0, len(layer.weight)) for layer in self._layers]
        self._derivative = UpdateDerivative(optimizer) if record else None
        self._norms = NormBuffer(len(self._parameters))

    @torch.no_grad()
    def __call__(self, inputs: Tensor, labels: Tensor, batch_size: int | None = None) -> None:
        """Train on one batch: inputs [N, ...], labels [N].

        `batch_size` is that of the whole batch where these samples are this worker's share of it,
        which may be none.
        """
        activations = self._forward(inputs.flatten(1))
        logits_NC = activations.pop()
        products = self._backward(activations, loss_gradient(logits_NC, labels, batch_size))
        self._workers.sum(self._gradients)
        if self._derivative is None:
            self._optimizer.step()
            return
        self._derivative.before()
        self._optimizer.step()
        derivatives = self._derivative.after()
        found = [
            (factor, derivatives[id(parameter)])
            for layer, product in zip(self._layers, products, strict=True)
            for parameter, factor in ((layer.weight, product), (layer.bias, product.left))
        ]
        rows = self._norms.rows(len(labels), logits_NC)
        torch.stack([squares(*one) for one in found], out=rows)
        rates = [1.0 if isinstance(one, Diagonal) else one for _, one in found]
        self._norms.accept(len(labels), rates)
        self._latest = rows, rates

    def take(self) -> Tensor | None:
        """Return beta (layer, samples) of the steps since the last call; None if not recorded."""
        if self._derivative is None:
            return None
        rows, rates = self._norms.take()
        return (rows * rates.square()).unflatten(0, (-1, 2)).sum(1)  # weight and bias

    def latest(self) -> Tensor:
        """Return beta (layer, samples) of the last step, on its device, without waiting for it.

        In a CUDA graph behind the step, the tensor holds that of the last replay: a replay runs no
        Python and writes where the captured step wrote, so that `take` does not know of it.
        """
        rows, rates = self._latest
        squared_rates = (
            torch.tensor(rates, dtype=rows.dtype).square().tolist()
        )  # as `take` has them
        scaled = [row * rate for row, rate in zip(rows, squared_rates, strict=True)]
        return torch.stack(scaled).unflatten(0, (-1, 2)).sum(1)

    def _forward(self, inputs_NI: Tensor) -> list[Tensor]:
        """Return each layer's input, and the logits."""
        size = len(inputs_NI)
        if size > len(self._outputs[0]):
            self._outputs = [output.new_empty(size, output.shape[1]) for output in self._outputs]
        activations = [inputs_NI]
        for layer, output in zip(self._layers, self._outputs, strict=True):
            output_NO = output[:size]
            torch.addmm(layer.bias, activations[-1], layer.weight.t(), out=output_NO)
            activations.append(output_NO if layer is self._layers[-1] else output_NO.relu_())
        return activations

    def _backward(self, activations: list[Tensor], delta_NO: Tensor) -> list[Product]:
        """Fill the gradients, last layer first, and return those of each weight by sample."""
        products: list[Product] = []
        for position in reversed(range(len(self._layers))):
            layer, activation_NI = self._layers[position], activations[position]
            products.insert(0, Product(Explicit(delta_NO), Explicit(activation_NI)))
            if self._derivative is not None and not self._derivative.elementwise:
                products[0].square()  # now, while both are in the cache; the factors keep it
            torch.mm(delta_NO.t(), activation_NI, out=layer.weight.grad)
            torch.sum(delta_NO, 0, out=layer.bias.grad)
            if position:
                delta_NO = aten.threshold_backward(delta_NO @ layer.weight, activation_NI, 0)
        return products


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
