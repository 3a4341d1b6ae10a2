"""First and second derivatives of a step of any network, against autograd without the recorder.

The oracle is a loop over single losses for the inner products, and a double backward pass of the
plain loss for the products with the Hessian; differences of gradients where that pass is wrong.
"""

import gc
import weakref

import networks
import pytest
import torch
from networks import CASES, Calls, parameter, stack
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from sampimp.errors import UnsupportedError
from sampimp.influence import twice_differentiable
from sampimp.influence.any_network import NetworkDerivatives
from sampimp.influence.gauss_newton import gauss_newton_products
from sampimp.training.models import build_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a perf"),  # operations without a vmap kernel
    pytest.mark.usefixtures("double_precision"),
]

UNSUPPORTED = {
    **{name: "_embedding_bag_backward" for name in CASES if "embedding_bag" in name},
    "distances and a temperature": "_cdist_backward",
    "gradients that a hook changes": "a hook on a gradient",
    "instance_norm that tracks": "a change of 1.running_mean, 1.running_var",
}
"""By case: what its error names."""

WRONG_IN_PYTORCH = {name for name in CASES if "weight_norm" in name}
"""Cases with an operation whose second derivative is wrong in PyTorch, and replaced here."""


def random_directions(model, count):
    generator = torch.Generator().manual_seed(5)
    return [
        torch.randn(count, *p.shape, generator=generator, dtype=p.dtype) for p in model.parameters()
    ]


def zeros_like(directions):
    return [torch.zeros_like(direction) for direction in directions]


def layer_names(model):
    return [name.rpartition(".")[0] or "model" for name, _ in model.named_parameters()]


def gradients_of(loss, model, **options):
    """Return the gradient by each parameter, zero for frozen and unused ones."""
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, trained, allow_unused=True, **options)
    by_id = {id(p): g for p, g in zip(trained, gradients, strict=True) if g is not None}
    return [by_id.get(id(p), torch.zeros_like(p)) for p in model.parameters()]


def inner_of(losses, weights, model, directions, layers):
    """Return w_i <direction, gradient of loss i> by layer, (K, L, N), from a loop over samples."""
    inner = torch.zeros(len(directions[0]), len(layers), len(losses))
    for sample, (loss, weight) in enumerate(zip(losses, weights, strict=True)):
        gradients = gradients_of(weight * loss, model, retain_graph=True)
        for name, direction, gradient in zip(
            layer_names(model), directions, gradients, strict=True
        ):
            inner[:, layers.index(name), sample] += (
                (direction * gradient).reshape(len(direction), -1).sum(1)
            )
    return inner


def products_of(loss, model, directions):
    """Return the Hessian's products by a plain double backward pass."""
    gradients = gradients_of(loss, model, create_graph=True)
    products = []
    for k in range(len(directions[0])):
        along = sum((g * d[k]).sum() for g, d in zip(gradients, directions, strict=True))
        products.append(gradients_of(along, model, retain_graph=True))
    return [torch.stack(of_parameter) for of_parameter in zip(*products, strict=True)]


def differences_of(loss, model, directions, width=1e-5):
    """Return the Hessian's products by central differences of gradients."""
    trained = [p for p in model.parameters() if p.requires_grad]
    products = []
    for k in range(len(directions[0])):
        ends = []
        for step in (width, -width):
            shifts = [
                step * d[k]
                for p, d in zip(model.parameters(), directions, strict=True)
                if p.requires_grad
            ]
            with torch.no_grad():
                torch._foreach_add_(trained, shifts)
            ends.append(gradients_of(loss(), model))
            with torch.no_grad():
                torch._foreach_sub_(trained, shifts)
        products.append([(a - b) / (2 * width) for a, b in zip(*ends, strict=True)])
    return [torch.stack(of_parameter) for of_parameter in zip(*products, strict=True)]


def assert_near(values, expected, relative):
    """Compare tensors, relative to the largest entry of each, or of all where that is 0."""
    expected = [tensor.detach() for tensor in expected]
    largest = max(float(tensor.abs().max()) for tensor in expected)
    for got, want in zip(values, expected, strict=True):
        assert got.shape == want.shape
        scale = float(want.abs().max()) or largest
        assert float((got - want).abs().max()) <= relative * scale


def check(model, losses, weights, count=2, difference=None):
    """Compare a step's derivatives with the oracles; return the step."""
    derivatives = NetworkDerivatives(model, lambda batch: losses())
    step = derivatives.at([None], [weights], first_of_epoch=True)
    directions = random_directions(model, count)
    out = zeros_like(directions)
    inner = step.products(directions, out)
    with sdpa_kernel(SDPBackend.MATH):  # the others cannot be differentiated twice
        plain = losses()
    expected = inner_of(plain, weights, model, directions, list(derivatives.layers))
    assert_near([inner], [expected], 1e-11)
    gradients = [
        torch.zeros_like(p) if g is None else g
        for p, g in zip(model.parameters(), step.gradients(), strict=True)
    ]
    assert_near(gradients, gradients_of((weights * plain).sum(), model, retain_graph=True), 1e-12)
    if difference is None:
        assert_near(out, products_of((weights * plain).sum(), model, directions), 1e-11)
    else:
        by_difference = differences_of(lambda: (weights * losses()).sum(), model, directions)
        assert_near(out, by_difference, difference)
    return step


@pytest.mark.parametrize("name", [name for name in CASES if name not in UNSUPPORTED])
def test_every_kind_of_layer(name):
    torch.manual_seed(1)
    case = CASES[name]()
    weights = torch.rand(len(case.losses())) + 0.5
    check(case.model, case.losses, weights, difference=1e-6 if name in WRONG_IN_PYTORCH else None)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_an_operation_without_a_second_derivative_is_named(name):
    torch.manual_seed(1)
    case = CASES[name]()
    derivatives = NetworkDerivatives(case.model, lambda batch: case.losses())
    directions = random_directions(case.model, 1)
    with pytest.raises(UnsupportedError) as error:
        derivatives.at([None], [torch.ones(3)]).products(directions, zeros_like(directions))
    assert error.value.got == UNSUPPORTED[name]


MODELS = {
    "mlp": ((1, 4, 4), (6, 5)),
    "cnn": ((1, 8, 8), ()),
    "resnet18": ((3, 4, 4), ()),
    "lstm": ((1, 5, 4), ()),
    "gru": ((1, 5, 4), ()),
    "transformer": ((1, 4, 4), ()),
}


def study_network(name, count=3):
    """Return a network of a study with a batch."""
    shape, hidden = MODELS[name]
    model = build_model(name, shape, hidden, 4, seed=1).double()
    with torch.no_grad():
        for p in model.parameters():  # away from zero, which hides mixing
            p += 0.02 * torch.randn_like(p)
    return model, torch.randn(count, *shape), torch.arange(count) % 4


def cross_entropy(model):
    """Return the function from a batch to its losses."""
    return lambda batch: functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


@pytest.mark.parametrize("name", MODELS)
def test_the_networks_of_a_study(name):
    torch.manual_seed(1)
    model, *batch = study_network(name)
    losses = cross_entropy(model)
    count = 1 if name == "resnet18" else 2  # 11 million parameters
    step = check(model, lambda: losses(batch), torch.tensor([0.5, 0.25, 0.25]), count)
    expected = [
        gradients_of(weight * loss, model, retain_graph=True)
        for weight, loss in zip((0.5, 0.25), losses(batch), strict=False)
    ]
    for position, gradients in enumerate(zip(*expected, strict=True)):
        assert_near([step.sample_gradients([0, 1])[position]], [torch.stack(gradients)], 1e-11)


@pytest.mark.parametrize("name", ["mlp", "cnn", "lstm", "gru", "transformer"])
def test_the_products_are_differences_of_gradients(name):
    """An oracle without a second derivative; relative 1e-6 of central differences."""
    torch.manual_seed(1)
    model, *batch = study_network(name)
    losses = cross_entropy(model)
    check(model, lambda: losses(batch), torch.full((3,), 1 / 3), count=1, difference=1e-6)


def test_accumulated_batches_are_one_step():
    torch.manual_seed(1)
    model, inputs, labels = study_network("gru", 5)
    derivatives = NetworkDerivatives(model, cross_entropy(model))
    directions = random_directions(model, 2)
    weights = torch.rand(5)
    whole, parts = zeros_like(directions), zeros_like(directions)
    one = derivatives.at([(inputs, labels)], [weights])
    batches = [(inputs[:2], labels[:2]), (inputs[2:], labels[2:])]
    two = derivatives.at(batches, [weights[:2], weights[2:]])
    assert_near([two.products(directions, parts)], [one.products(directions, whole)], 1e-12)
    assert_near(parts, whole, 1e-12)
    assert_near(two.gradients(), one.gradients(), 1e-12)
    assert_near(two.sample_gradients([3, 1, 4]), one.sample_gradients([3, 1, 4]), 1e-12)


def test_products_are_added_to_what_is_there():
    torch.manual_seed(1)
    model, *batch = study_network("mlp")
    step = NetworkDerivatives(model, cross_entropy(model)).at([batch], [torch.ones(3)])
    directions = random_directions(model, 2)
    once, twice = zeros_like(directions), zeros_like(directions)
    inner = step.products(directions, once)
    for _ in range(2):
        assert torch.equal(step.products(directions, twice), inner)
    assert_near(twice, [2 * product for product in once], 1e-15)
    assert torch.equal(step.inner(directions), inner)


def test_some_parameters_alone():
    """The others are constants: neither products nor inner products contain them."""
    torch.manual_seed(1)
    model, *batch = study_network("mlp")
    last = list(model.parameters())[-2:]
    derivatives = NetworkDerivatives(model, cross_entropy(model), last)
    directions = random_directions(model, 1)
    others = [
        d if p in set(last) else torch.zeros_like(d)
        for p, d in zip(model.parameters(), directions, strict=True)
    ]
    out, whole = zeros_like(directions[-2:]), zeros_like(directions)
    inner = derivatives.at([batch], [torch.ones(3)]).products(directions[-2:], out)
    step = NetworkDerivatives(model, cross_entropy(model)).at([batch], [torch.ones(3)])
    assert_near([inner], [step.products(others, whole)], 1e-13)
    assert_near(out, whole[-2:], 1e-13)
    assert inner[:, :-1].eq(0).all()


def test_dropout_has_the_masks_of_the_random_state():
    torch.manual_seed(1)
    model = stack(nn.Dropout(0.5))
    inputs = torch.randn(3, 4)
    state = torch.get_rng_state()

    def losses():
        torch.set_rng_state(state)
        return networks.losses(model(inputs))

    check(model, losses, torch.ones(3))
    derivatives = NetworkDerivatives(model, lambda x: networks.losses(model(x)))
    torch.set_rng_state(state)
    gradients = derivatives.at([inputs], [torch.ones(3)], first_of_epoch=True).gradients()
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    networks.losses(model(inputs)).sum().backward()
    assert torch.equal(torch.get_rng_state(), after)  # neither the proof nor the check drew
    assert_near(gradients, [p.grad for p in model.parameters()], 1e-14)


@pytest.mark.parametrize("name", ["cnn", "lstm", "transformer"])
def test_single_precision(name):
    """In float32, where oneDNN has an LSTM of its own and attention is fused."""
    torch.manual_seed(1)
    model, inputs, labels = study_network(name, 8)
    results = []
    for dtype in (torch.float64, torch.float32):
        model.to(dtype)
        # As in training, the losses are in float64.
        derivatives = NetworkDerivatives(
            model,
            lambda x: functional.cross_entropy(model(x).double(), labels, reduction="none"),
        )
        directions = [d.to(dtype) for d in random_directions(model.double(), 2)]
        model.to(dtype)
        out = zeros_like(directions)
        step = derivatives.at([inputs.to(dtype)], [torch.full((8,), 0.125)], first_of_epoch=True)
        results.append([step.products(directions, out), *out])
        assert all(values.dtype == dtype for values in results[-1])
    assert_near([part.double() for part in results[1]], results[0], 1e-4)
    assert torch._C._get_mkldnn_enabled()


def test_tensors_are_released_after_each_step():
    torch.manual_seed(1)
    model, *batch = study_network("lstm")
    derivatives = NetworkDerivatives(model, cross_entropy(model))
    directions = random_directions(model, 1)
    seen = []

    def losses(batch):
        values = cross_entropy(model)(batch)
        seen.append(weakref.ref(values))
        return values

    derivatives = NetworkDerivatives(model, losses)
    counts = []
    for _ in range(3):
        derivatives.at([batch], [torch.ones(3)]).products(directions, zeros_like(directions))
        gc.collect()
        counts.append(sum(isinstance(value, torch.Tensor) for value in gc.get_objects()))
    assert counts[2] == counts[1]
    assert [reference() for reference in seen] == [None] * 3


@pytest.mark.parametrize("name", ["mlp", "cnn", "gru"])
def test_the_gauss_newton_matrix(name):
    """Against J^T (d² loss / d outputs²) J with explicit J: p of softmax, diag(p) - p p^T."""
    torch.manual_seed(1)
    model, *batch = study_network(name)
    weights = torch.tensor([0.5, 0.2, 0.3])
    directions = random_directions(model, 2)
    out = zeros_like(directions)
    step = NetworkDerivatives(model, cross_entropy(model)).at([batch], [weights])
    inner = step.products(directions, out, curvature="gauss-newton")
    assert torch.equal(inner, step.inner(directions))
    logits = model(batch[0])
    flat = torch.cat([d.flatten(1) for d in directions], 1)
    expected = torch.zeros_like(flat)
    for row, weight in zip(logits, weights, strict=True):
        jacobian = torch.stack(
            [
                torch.cat([g.flatten() for g in gradients_of(logit, model, retain_graph=True)])
                for logit in row
            ]
        )
        p = row.detach().softmax(0)
        curvature = weight * (p.diag() - p.outer(p))
        expected += flat @ jacobian.t() @ curvature @ jacobian
    assert_near([torch.cat([values.flatten(1) for values in out], 1)], [expected], 1e-11)


def test_the_gauss_newton_matrix_needs_one_output():
    torch.manual_seed(1)
    case = CASES["lstm, deep, outputs and states"]()
    step = NetworkDerivatives(case.model, lambda _: case.losses()).at([None], [torch.ones(3)])
    directions = random_directions(case.model, 1)
    with pytest.raises(UnsupportedError, match="returned tuple"):
        step.products(directions, zeros_like(directions), curvature="gauss-newton")


def test_an_unused_parameter_has_a_gauss_newton_product_of_zero():
    used, unused = parameter(2), parameter(3)
    outputs = used.square()
    products = gauss_newton_products(
        outputs,
        outputs.square(),
        torch.ones(2),
        [used, unused],
        [torch.ones(1, 2), torch.ones(1, 3)],
    )
    assert_near(products[:1], [(8 * used.square())[None]], 1e-14)
    assert products[1].tolist() == [[0, 0, 0]]


class Square(torch.autograd.Function):
    """x², whose backward pass takes the slope for a constant."""

    @staticmethod
    def forward(ctx, x):
        ctx.slope = 2 * x.detach()
        return x.square()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.slope


def squared(model, x):
    return Square.apply(model.first(x)) @ model.second


def hooked(model, x):
    hidden = model.first(x)
    hidden.register_hook(lambda gradient: 0.5 * gradient)
    return hidden.tanh()


def with_hook(register):
    model = stack()
    register(model)
    return model


def autocast(model, x):
    with torch.autocast("cpu", torch.bfloat16):
        return model.first(x).double()


REFUSED = {
    "a Function": (
        lambda: Calls(squared, first=nn.Linear(4, 3), second=parameter(3, 2)),
        "autograd.Function Square",
    ),
    "a hook on a tensor": (lambda: Calls(hooked, first=nn.Linear(4, 3)), "tensor of the forward"),
    "a hook on a module": (
        lambda: with_hook(lambda m: m[0].register_full_backward_hook(lambda *_: None)),
        "module 0",
    ),
    "a hook on a parameter": (
        lambda: with_hook(lambda m: m[2].weight.register_hook(lambda g: g)),
        "parameter 2.weight",
    ),
    "autocast": (lambda: Calls(autocast, first=nn.Linear(4, 3)).float(), "half precision"),
    "batch norm": (lambda: stack(nn.BatchNorm1d(6)), "BatchNorm"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_exact_derivative_is_refused(name):
    torch.manual_seed(1)
    make, message = REFUSED[name]
    model = make()
    inputs = torch.randn(3, 4, dtype=next(model.parameters()).dtype)
    directions = random_directions(model, 1)
    with pytest.raises(UnsupportedError, match=message):
        NetworkDerivatives(model, lambda x: networks.losses(model(x))).at(
            [inputs], [torch.ones(3)]
        ).products(directions, zeros_like(directions))


def test_a_second_derivative_that_is_wrong_is_not_symmetric(monkeypatch):
    """That of PyTorch's own weight_norm, which takes the norm for a constant."""
    monkeypatch.setattr(twice_differentiable, "_weight_norm", torch._weight_norm)
    torch.manual_seed(1)
    case = CASES["weight_norm"]()
    step = NetworkDerivatives(case.model, lambda _: case.losses()).at([None], [torch.ones(3)])
    directions = random_directions(case.model, 1)
    with pytest.raises(UnsupportedError, match="symmetric"):
        step.products(directions, zeros_like(directions))


def test_a_wrong_factor_is_found_and_its_layer_named():
    torch.manual_seed(1)
    model, *batch = study_network("cnn")
    step = NetworkDerivatives(model, cross_entropy(model)).at([batch], [torch.ones(3)])
    factors = step._factors[0]
    wrong = factors[2]  # of the weight of conv2, with another sample's delta
    factors[2] = wrong.joined(torch.tensor([[1], [1], [2]]))
    directions = random_directions(model, 1)
    with pytest.raises(UnsupportedError) as error:
        step.products(directions, zeros_like(directions))
    assert error.value.where == "layer conv2"
    assert "for sample 0 of the step" in error.value.got


def test_losses_have_to_be_those_of_the_samples():
    model, *batch = study_network("mlp")
    derivatives = NetworkDerivatives(model, lambda b: cross_entropy(model)(b).mean())
    with pytest.raises(UnsupportedError, match="losses of 3 samples"):
        derivatives.at([batch], [torch.ones(3)])
