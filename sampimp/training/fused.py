"""One training step of a stack of linear layers, written out, with its importance.

For layers d = 1 .. D, x_1 the batch, W_d and b_d the weights and biases:

    z_d = x_d W_d^T + b_d, x_{d+1} = f(z_d), without the activation f after the last layer
    delta_D = d(mean loss)/d(logits), the softmax in float64
    for d = D .. 1:
        the gradients of W_d and b_d are delta_d^T x_d and the sum of delta_d
        delta_{d-1} = (delta_d W_d) f'(z_{d-1})
    the optimizer's step
    for d = 1 .. D: importance from x_d, delta_d and the derivative of the update

If several workers share a batch, the gradients are summed over them before the update; the mean of
the loss is over the whole batch in either case.

The operations and their order are those of autograd on such a network, so that the parameters are
equal bit for bit (tests/training/test_fused.py). The step saves autograd's bookkeeping, and memory
traffic: gradients and activations keep their buffers from step to step, whereas autograd allocates
fresh pages for several megabytes. Its cost is measured in `benchmarks/` (`make bench`).

Map: `FusedStep`, `loss_gradient`.

Shape suffixes: N samples of a batch, I inputs and O outputs of a layer, C classes.
"""

import torch
from torch import Tensor, nn

from sampimp.errors import UnsupportedError
from sampimp.importance.buffer import NormBuffer
from sampimp.importance.gradients import Explicit, Product, squares
from sampimp.importance.update import Diagonal, UpdateDerivative
from sampimp.training.activations import ACTIVATIONS, Activation, activation_of
from sampimp.training.collective import SINGLE_PROCESS, ProcessGroup

aten = torch.ops.aten


class FusedStep:
    """Train a stack of linear layers on the mean cross-entropy, and record importance.

    Parameters
    ----------
    model
        Linear layers alternating with activations of `sampimp.training.activations`, optionally
        after a Flatten; all layers are trained.
    optimizer
        An optimizer over all parameters of the model; `sampimp.importance.optimizers` lists those
        that can be recorded.
    record
        False trains the same parameters without measuring importance.
    process_group
        The workers that share each batch; all have the same parameters.

    Raises
    ------
    UnsupportedError
        The model is not such a stack, or the optimizer has no rule.
    """

    def __init__(
        self,
        model: nn.Sequential,
        optimizer: torch.optim.Optimizer,
        *,
        record: bool,
        process_group: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        self._optimizer, self._process_group = optimizer, process_group
        self.layers, self.activations = _require_stack(model)
        self._parameters = list(model.parameters())
        trained = {
            id(parameter) for group in optimizer.param_groups for parameter in group["params"]
        }
        if not all(
            parameter.requires_grad and id(parameter) in trained for parameter in self._parameters
        ):
            raise UnsupportedError(
                expected="an optimizer over all parameters of the model, none of them frozen",
                got="a frozen parameter, or one that the optimizer does not update",
                where="the fused training step",
                todo="train it in your own loop, with ImportanceRecorder around the step",
            )
        # One tensor per gradient: the last bit of MKL's products depends on where a matrix starts
        # in memory. With views of one buffer, 3 % of small random networks differed from autograd.
        self._gradients = [torch.empty_like(parameter) for parameter in self._parameters]
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        self._make_buffers(0)
        self._derivative = UpdateDerivative(optimizer) if record else None
        self._norms = NormBuffer(len(self._parameters))

    @torch.no_grad()
    def __call__(
        self,
        inputs: Tensor,
        labels: Tensor,
        batch_size: float | None = None,
        weights: Tensor | None = None,
    ) -> None:
        """Train on one batch: inputs [N, ...], labels [N].

        `batch_size` is the size of the whole batch if these samples are only this worker's share
        of it; the share may be empty. For `weights` [N] see `sampimp.training.steps.TrainingStep`.
        """
        activations, kept, logits_NC = self._forward(inputs.flatten(1))
        delta_NC = loss_gradient(logits_NC, labels, batch_size)
        if weights is not None:
            delta_NC = delta_NC * weights[:, None]
        products = self._backward(activations, kept, delta_NC)
        self._process_group.sum(self._gradients)
        if self._derivative is None:
            self._optimizer.step()
            return
        self._derivative.before()
        self._optimizer.step()
        derivatives = self._derivative.after()
        factors = [
            (factor, derivatives[id(parameter)])
            for layer, product in zip(self.layers, products, strict=True)
            for parameter, factor in ((layer.weight, product), (layer.bias, product.left))
        ]
        rows = self._norms.rows(len(labels), logits_NC)
        torch.stack([squares(factor, derivative) for factor, derivative in factors], out=rows)
        rates = [
            1.0 if isinstance(derivative, Diagonal) else derivative for _, derivative in factors
        ]
        self._norms.accept(len(labels), rates)
        self._latest = rows, rates

    def take(self) -> Tensor | None:
        """Return beta (layer, samples) of the steps since the last call; None if not recorded."""
        if self._derivative is None:
            return None
        rows, rates = self._norms.take()
        return (rows * rates.square()).unflatten(0, (-1, 2)).sum(1)  # weight and bias

    def latest(self) -> Tensor:
        """Return beta (layer, samples) of the last step, on its device, without synchronizing.

        If the step was captured in a CUDA graph, the tensor holds the importance of the last
        replay: a replay runs no Python and overwrites the captured step's buffers, so that `take`
        misses it.
        """
        rows, rates = self._latest
        # `take` squares the rates in this precision.
        squared_rates = torch.tensor(rates, dtype=rows.dtype).square().tolist()
        scaled = [row * rate for row, rate in zip(rows, squared_rates, strict=True)]
        return torch.stack(scaled).unflatten(0, (-1, 2)).sum(1)

    def _make_buffers(self, size: int) -> None:
        """Allocate, for batches of up to `size` samples, the outputs of layers and activations."""
        self._outputs = [layer.weight.new_empty(size, len(layer.weight)) for layer in self.layers]
        # In place where the backward pass does not read the layer's output.
        self._activated = [
            output if activation.reads_output else torch.empty_like(output)
            for output, activation in zip(self._outputs, self.activations, strict=False)
        ]

    def _forward(self, inputs_NI: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Return the layers' inputs, what each activation's backward pass reads, and the logits."""
        size = len(inputs_NI)
        if size > len(self._outputs[0]):
            self._make_buffers(size)
        activations = [inputs_NI]
        kept: list[Tensor] = []
        for layer, output in zip(self.layers, self._outputs, strict=True):
            torch.addmm(layer.bias, activations[-1], layer.weight.t(), out=output[:size])
            if layer is not self.layers[-1]:
                position = len(kept)
                activated_NO = self._activated[position][:size]
                self.activations[position].forward(output[:size], out=activated_NO)
                activations.append(activated_NO)
                kept.append(output[:size])
        return activations, kept, output[:size]

    def _backward(
        self, activations: list[Tensor], kept: list[Tensor], delta_NO: Tensor
    ) -> list[Product]:
        """Compute the gradients, last layer first; return each weight's per-sample gradients."""
        products: list[Product] = []
        for position in reversed(range(len(self.layers))):
            layer, activation_NI = self.layers[position], activations[position]
            products.insert(0, Product(Explicit(delta_NO), Explicit(activation_NI)))
            if self._derivative is not None and not self._derivative.elementwise:
                # Computed now, while both factors are in the CPU's cache; they store the result.
                products[0].square()
            torch.mm(delta_NO.t(), activation_NI, out=layer.weight.grad)
            torch.sum(delta_NO, 0, out=layer.bias.grad)
            if position:
                backward = self.activations[position - 1].backward
                delta_NO = backward(delta_NO @ layer.weight, kept[position - 1])
        return products


def loss_gradient(logits_NC: Tensor, labels_N: Tensor, batch_size: float | None = None) -> Tensor:
    """Return the gradient of the batch's mean cross-entropy at the logits, shape (N, C).

    The mean is over `batch_size` samples, by default over those of `labels_N`.

    The softmax is computed in float64: in float32 the gradient p - 1 of a confident sample cancels,
    and by epoch 40 of MNIST the importance of half the samples was rounding error (against a replay
    in float64, 42 % off at the median; with the softmax in float64, 4e-6).

    Examples
    --------
    >>> loss_gradient(torch.zeros(1, 4), torch.tensor([2]))
    tensor([[ 0.2500,  0.2500, -0.7500,  0.2500]])
    """
    log_softmax_NC = torch.log_softmax(logits_NC.double(), 1)
    mean = 1  # ATen's code of this reduction
    count = log_softmax_NC.new_full((), len(labels_N) if batch_size is None else batch_size)
    unit = log_softmax_NC.new_ones(())  # d(loss)/d(loss)
    gradient_NC = aten.nll_loss_backward(unit, log_softmax_NC, labels_N, None, mean, -100, count)
    delta_NC = aten._log_softmax_backward_data(gradient_NC, log_softmax_NC, 1, torch.float64)
    return delta_NC.to(logits_NC.dtype)


def _require_stack(model: nn.Sequential) -> tuple[list[nn.Linear], list[Activation]]:
    """Return the linear layers and activations; raise UnsupportedError for any other network."""
    modules = [module for module in model if not isinstance(module, nn.Flatten)]
    layers = [module for module in modules[::2] if type(module) is nn.Linear]
    activations = [found for module in modules[1::2] if (found := activation_of(module))]
    if (
        len(layers) != len(activations) + 1
        or len(layers) + len(activations) != len(modules)
        or any(layer.bias is None for layer in layers)
    ):
        raise UnsupportedError(
            expected="Linear layers with biases, alternating with activations "
            f"({', '.join(ACTIVATIONS)})",
            got=", ".join(map(str, modules)) or "no layer",
            where="the model of the training run",
            todo="train it in your own loop, with ImportanceRecorder around the step",
        )
    return layers, activations
