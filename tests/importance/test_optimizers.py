"""D against the real `optimizer.step()`: by autograd through the step, and by differences."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn, optim

from sampimp.importance import optimizers, parameter_step
from sampimp.importance.optimizers import derivative_rule
from sampimp.importance.parameter_step import DerivativeRule
from sampimp.importance.update import Diagonal, UpdateDerivative

RATE, DECAY = st.floats(1e-3, 0.5), st.sampled_from([0.0, 1e-3, 0.1])
MAXIMIZE, EPS = st.booleans(), st.sampled_from([1e-8, 1e-3, 0.1])
BETAS = st.tuples(st.sampled_from([0.0, 0.5, 0.9]), st.sampled_from([0.0, 0.5, 0.999]))

# Settings of one parameter group, by class.
SETTINGS = {
    optim.SGD: st.one_of(
        st.fixed_dictionaries(
            {
                "momentum": st.sampled_from([0.0, 0.5, 0.9]),
                "dampening": st.sampled_from([0.0, 0.3]),
                "lr": RATE,
                "weight_decay": DECAY,
                "maximize": MAXIMIZE,
            }
        ),
        st.fixed_dictionaries(
            {"momentum": st.just(0.7), "nesterov": st.just(True), "lr": RATE, "maximize": MAXIMIZE}
        ),
    ),
    optim.Adam: st.fixed_dictionaries(
        {
            "lr": RATE,
            "betas": BETAS,
            "eps": EPS,
            "weight_decay": DECAY,
            "amsgrad": st.booleans(),
            "maximize": MAXIMIZE,
            "decoupled_weight_decay": st.booleans(),
        }
    ),
    optim.AdamW: st.fixed_dictionaries(
        {
            "lr": RATE,
            "betas": BETAS,
            "eps": EPS,
            "weight_decay": DECAY,
            "amsgrad": st.booleans(),
            "maximize": MAXIMIZE,
        }
    ),
    optim.RMSprop: st.fixed_dictionaries(
        {
            "lr": RATE,
            "alpha": st.sampled_from([0.5, 0.99]),
            "eps": EPS,
            "weight_decay": DECAY,
            "momentum": st.sampled_from([0.0, 0.9]),
            "centered": st.booleans(),
            "maximize": MAXIMIZE,
        }
    ),
    optim.Adagrad: st.fixed_dictionaries(
        {
            "lr": RATE,
            "lr_decay": st.sampled_from([0.0, 0.1]),
            "initial_accumulator_value": st.sampled_from([0.0, 0.5]),
            "eps": EPS,
            "weight_decay": DECAY,
            "maximize": MAXIMIZE,
        }
    ),
}
SHAPES = st.sampled_from([(), (3,), (2, 3), (2, 1, 2)])
CLASSES = pytest.mark.parametrize("kind", SETTINGS, ids=lambda kind: kind.__name__)


def by_autograd(optimizer):
    """Return D of each parameter by autograd through the real step, on copies."""
    derivatives = []
    for group in optimizer.param_groups:
        chosen = {
            name: value
            for name, value in group.items()
            if name not in ("params", "foreach", "fused", "capturable", "differentiable")
            and not (type(optimizer) is optim.AdamW and name == "decoupled_weight_decay")
        }
        for parameter in group["params"]:
            if parameter.grad is None:
                derivatives.append(None)
                continue
            copied = parameter.detach().clone()
            gradient = copied.grad = parameter.grad.detach().clone().requires_grad_()
            other = type(optimizer)([copied], differentiable=True, **chosen)
            other.state[copied].update(copy.deepcopy(dict(optimizer.state.get(parameter, {}))))
            # With a count in float32 the differentiable step's bias correction differs from the
            # plain one's by 1e-5; the count has the default dtype.
            if "step" in other.state[copied]:
                other.state[copied]["step"] = other.state[copied]["step"].double()
            torch.set_default_dtype(torch.float64)
            try:
                other.step()
            finally:
                torch.set_default_dtype(torch.float32)
            # Each element's update depends on its own gradient alone (by_difference checks that).
            derivatives.append(torch.autograd.grad(copied.sum(), gradient)[0])
    return derivatives


def by_linearity(optimizer):
    """Return D of each parameter under SGD: the step for a gradient larger by 1, minus the step.

    Exact, since the step is linear. Autograd would see only a part of it: torch detaches the first
    momentum buffer from its gradient.
    """
    plain, larger = copy.deepcopy(optimizer), copy.deepcopy(optimizer)
    pairs = []
    for first, second, parameter in zip(
        *([p for g in o.param_groups for p in g["params"]] for o in (plain, larger, optimizer)),
        strict=True,
    ):
        if parameter.grad is not None:
            first.grad, second.grad = parameter.grad.clone(), parameter.grad + 1
        pairs.append((first, second))
    plain.step()
    larger.step()
    return [None if p.grad is None else (q - p).detach() for p, q in pairs]


def by_difference(optimizer, size=1e-5):
    """Return the full matrix d(update)/d(gradient) of the first parameter, from real steps."""
    columns = []
    for element in range(optimizer.param_groups[0]["params"][0].numel()):
        ends = []
        for shift in (size, -size):
            other = copy.deepcopy(optimizer)  # with its parameters
            parameter = other.param_groups[0]["params"][0]
            parameter.grad = optimizer.param_groups[0]["params"][0].grad.clone()
            parameter.grad.view(-1)[element] += shift
            other.step()
            ends.append(parameter.detach().flatten())
        columns.append((ends[0] - ends[1]) / (2 * size))
    return torch.stack(columns, dim=1)


def recorded_step(optimizer, derivative):
    """Make a step and return D of each parameter, in the optimizer's order."""
    derivative.before()
    optimizer.step()
    tensors = {
        key: value.tensor() if isinstance(value, Diagonal) else value
        for key, value in derivative.after().items()
    }
    return [tensors.get(id(p)) for group in optimizer.param_groups for p in group["params"]]


def make_parameters(rng, shapes, dtype=torch.float64):
    return [nn.Parameter(torch.tensor(rng.normal(size=shape), dtype=dtype)) for shape in shapes]


def set_gradients(rng, parameters, smallest=0.1):
    """Draw gradients of either sign, with absolute values above `smallest`."""
    for parameter in parameters:
        values = np.asarray(rng.normal(size=tuple(parameter.shape)))
        values += np.copysign(smallest, values)
        parameter.grad = torch.tensor(values, dtype=parameter.dtype)


def assert_close(got, expected, rtol=1e-9, atol=1e-9):
    torch.testing.assert_close(
        torch.as_tensor(got, dtype=torch.float64).expand_as(expected),
        expected,
        rtol=rtol,
        atol=atol,
    )


@CLASSES
@settings(max_examples=25)
@given(data=st.data())
def test_derivative_is_that_of_the_real_step(kind, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    first, second = make_parameters(rng, data.draw(st.tuples(SHAPES, SHAPES)))
    groups = [{"params": [p], **data.draw(SETTINGS[kind])} for p in (first, second)]
    if kind is optim.Adagrad:  # it takes one start value for all groups
        start = groups[0]["initial_accumulator_value"]
        optimizer = kind(groups, initial_accumulator_value=start)
    else:
        optimizer = kind(groups)
    derivative = UpdateDerivative(optimizer)
    for step in range(4):  # the first one without any state
        set_gradients(rng, (first, second))
        if step == 2:
            second.grad = None
        expected = by_linearity(optimizer) if kind is optim.SGD else by_autograd(optimizer)
        for got, true in zip(recorded_step(optimizer, derivative), expected, strict=True):
            if true is None:
                assert got is None
            else:
                # D has the size of lr / gradient; in the first Adam step it is a difference of two
                # such terms.
                assert_close(got, true, atol=1e-13)


@CLASSES
@settings(max_examples=8)
@given(data=st.data())
def test_each_element_moves_with_its_own_gradient_only(kind, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    (parameter,) = make_parameters(rng, [data.draw(SHAPES)])
    optimizer = kind([parameter], **data.draw(SETTINGS[kind]))
    derivative = UpdateDerivative(optimizer)
    for _ in range(3):
        set_gradients(rng, [parameter], smallest=0.5)
        matrix = by_difference(optimizer)
        (got,) = recorded_step(optimizer, derivative)
        got = torch.as_tensor(got, dtype=torch.float64).expand_as(parameter).flatten()
        # The rounding error of a parameter of size 1, divided by 2e-5, is 1e-11.
        assert_close(torch.diag(got), matrix, rtol=1e-6, atol=1e-9)


def test_first_step_of_adam_hardly_moves_with_the_gradient():
    weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    weight.grad = torch.tensor([1.0, -0.5, 0.25], dtype=torch.float64)
    optimizer = optim.AdamW([weight], lr=0.1, eps=1e-3)
    derivative = UpdateDerivative(optimizer)
    first = recorded_step(optimizer, derivative)[0].clone()
    assert_close(first, -0.1 * 1e-3 / (weight.grad.abs() + 1e-3) ** 2)
    (second,) = recorded_step(optimizer, derivative)
    # The second does, even for the same gradient: lr/|g| (0.1/0.19 - 0.001/0.001999) is 0.0026/|g|.
    assert (second.abs() > 5 * first.abs()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("kind", "chosen", "slope"),
    [
        # -lr (1 - beta1) / (1 - beta1^2) / eps at the second step
        (optim.Adam, {}, 0.1 / 0.19),
        (optim.AdamW, {"amsgrad": True, "maximize": True}, -0.1 / 0.19),
        (optim.RMSprop, {}, 1.0),
        (optim.RMSprop, {"centered": True}, 1.0),
        (optim.Adagrad, {}, 1.0),
    ],
)
def test_gradients_that_have_always_been_zero_have_the_finite_limit(kind, chosen, slope, dtype):
    weight = nn.Parameter(torch.ones(4, dtype=dtype))
    optimizer = kind([weight], lr=0.1, eps=1e-8, weight_decay=0, **chosen)
    derivative = UpdateDerivative(optimizer)
    # In float32 the square of 1e-24 is 0 while the gradient is not.
    weight.grad = torch.tensor([0.0, -0.0, 1e-24, 1.0], dtype=dtype)
    for _ in range(2):
        (got,) = recorded_step(optimizer, derivative)
    np.testing.assert_allclose(got[:3].double(), -0.1 * slope / 1e-8, rtol=1e-6)
    assert got.isfinite().all()


def test_zero_gradient_limit_is_that_of_the_real_step():
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = optim.Adam([weight], lr=0.1, eps=0.1)
    weight.grad = torch.zeros(1, dtype=torch.float64)
    expected = by_difference(optimizer, size=1e-9)
    assert_close(recorded_step(optimizer, UpdateDerivative(optimizer))[0], expected[0], rtol=1e-6)


def test_second_moment_below_its_maximum_does_not_move():
    weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = optim.Adam([weight], lr=0.1, betas=(0.5, 0.9), amsgrad=True)
    derivative = UpdateDerivative(optimizer)
    weight.grad = torch.tensor([10.0, 1.0], dtype=torch.float64)
    recorded_step(optimizer, derivative)
    weight.grad = torch.tensor([1.0, 10.0], dtype=torch.float64)  # below the maximum, above it
    (got,) = recorded_step(optimizer, derivative)
    largest = 0.1 * 100  # second moment of the first element, held from the first step
    linear = -0.1 / 0.75 * 0.5 / (np.sqrt(largest / (1 - 0.81)) + 1e-8)
    assert got[0].item() == pytest.approx(linear, rel=1e-12)
    assert abs(got[1].item()) < 0.9 * abs(linear)


@pytest.mark.parametrize("kind", [optim.SGD, optim.Adam, optim.AdamW, optim.Adagrad, optim.RMSprop])
def test_every_implementation_and_a_tensor_rate_have_the_same_derivative(kind):
    def derive(**chosen):
        rng = np.random.default_rng(0)
        parameters = make_parameters(rng, [(3, 2), (4,)])
        optimizer = kind(parameters, weight_decay=0.1, **chosen)
        derivative = UpdateDerivative(optimizer)
        for _ in range(3):
            set_gradients(rng, parameters)
            derivatives = recorded_step(optimizer, derivative)
        return derivatives

    expected = derive(lr=0.1, foreach=False)
    variants = [{"lr": 0.1, "foreach": True}, {"lr": torch.tensor(0.1, dtype=torch.float64)}]
    if kind is not optim.RMSprop:
        variants.append({"lr": 0.1, "fused": True})
    for chosen in variants:
        for got, true in zip(derive(**chosen), expected, strict=True):
            assert type(got) is type(true)
            assert_close(got, torch.as_tensor(true, dtype=torch.float64), rtol=1e-12)


@pytest.mark.parametrize("kind", [optim.Adam, optim.AdamW])
def test_a_count_on_an_accelerator_is_exact(kind, monkeypatch):
    """There the count is a float32 tensor and is not read; this pretends to be an accelerator."""

    def derive():
        rng = np.random.default_rng(0)
        (weight,) = make_parameters(rng, [(3, 2)])
        derivative = UpdateDerivative(optimizer := kind([weight], lr=0.1, fused=True))
        steps = []
        for _ in range(3):
            set_gradients(rng, [weight])
            steps += recorded_step(optimizer, derivative)
        return torch.stack(steps)

    expected, read = derive(), optimizers._number
    monkeypatch.setattr(
        optimizers,
        "_number",
        lambda setting: (
            optimizers._on_device(setting) if isinstance(setting, torch.Tensor) else read(setting)
        ),
    )
    assert_close(derive(), expected, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("chosen", [{}, {"weight_decay": 0.1}, {"amsgrad": True}])
def test_large_parameters_are_processed_by_blocks(monkeypatch, memory_format, chosen):
    rng = np.random.default_rng(0)
    (weight,) = make_parameters(rng, [(5, 3, 2, 2)])
    weight.data = weight.data.contiguous(memory_format=memory_format)
    optimizer = optim.Adam([weight], lr=0.1, **chosen)
    derivative = UpdateDerivative(optimizer)
    monkeypatch.setattr(
        parameter_step, "BLOCK_ON_CPU", 24
    )  # blocks of two of the five rows; the last has one
    for _ in range(2):
        set_gradients(rng, [weight])
        (expected,) = by_autograd(optimizer)
        (got,) = recorded_step(optimizer, derivative)
        assert_close(got, expected, atol=1e-13)


@pytest.mark.parametrize("kind", [optim.Adam, optim.RMSprop, optim.Adagrad])
def test_a_diagonal_and_its_square_can_be_computed_in_any_order(kind):
    rng = np.random.default_rng(0)
    (weight,) = make_parameters(rng, [(3, 2)])
    derivative = UpdateDerivative(optimizer := kind([weight], lr=0.1, weight_decay=0.1))
    set_gradients(rng, [weight])
    derivative.before()
    optimizer.step()
    (diagonal,) = derivative.after().values()
    first = diagonal.tensor()
    torch.testing.assert_close(diagonal.square(), first.square())
    torch.testing.assert_close(diagonal.tensor(), first, rtol=0, atol=0)


@CLASSES
def test_training_is_left_as_it_is(kind):
    def train(recorded):
        rng = np.random.default_rng(0)
        parameters = make_parameters(rng, [(3, 2), (4,)], torch.float32)
        optimizer = kind(parameters, lr=0.1, weight_decay=0.1)
        derivative = UpdateDerivative(optimizer)
        for _ in range(3):
            set_gradients(rng, parameters)
            if recorded:
                recorded_step(optimizer, derivative)
            else:
                optimizer.step()
        return parameters, optimizer.state_dict()["state"]

    (with_parameters, with_state), (parameters, state) = train(True), train(False)
    assert all(map(torch.equal, with_parameters, parameters))
    torch.testing.assert_close(with_state, state, rtol=0, atol=0)


def test_a_loaded_state_and_changed_settings_take_effect():
    rng = np.random.default_rng(0)
    (weight,) = make_parameters(rng, [(2, 3)])
    optimizer = optim.AdamW([weight], lr=0.1)
    derivative = UpdateDerivative(optimizer)
    set_gradients(rng, [weight])
    recorded_step(optimizer, derivative)
    saved = copy.deepcopy(optimizer.state_dict())
    for _ in range(3):
        recorded_step(optimizer, derivative)
    optimizer.load_state_dict(saved)
    optimizer.param_groups[0]["lr"] = 0.01
    added = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer.add_param_group({"params": [added], "lr": 0.5})
    set_gradients(rng, [weight, added])
    expected = by_autograd(optimizer)
    for got, true in zip(recorded_step(optimizer, derivative), expected, strict=True):
        assert_close(got, true, atol=1e-13)


def test_half_precision_is_derived_in_single_precision():
    chosen = {"lr": 0.1, "betas": (0.5, 0.5)}
    derived = {}
    for dtype in (torch.bfloat16, torch.float32):
        weight = nn.Parameter(torch.zeros(3, dtype=dtype))
        optimizer = optim.Adam([weight], **chosen)
        derivative = UpdateDerivative(optimizer)
        for gradient in ([1.0, 2.0, -1.0], [0.5, -1.0, 0.0]):
            weight.grad = torch.tensor(gradient, dtype=dtype)
            (derived[dtype],) = recorded_step(optimizer, derivative)
    assert derived[torch.bfloat16].dtype == torch.float32
    torch.testing.assert_close(derived[torch.bfloat16], derived[torch.float32], rtol=0.02, atol=0)


def test_a_gradient_of_nan_gives_a_derivative_of_nan_only_there():
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([torch.nan, 1.0])
    (got,) = recorded_step(optimizer := optim.Adam([weight]), UpdateDerivative(optimizer))
    assert got.isnan().tolist() == [True, False]


def test_elementwise_is_known_before_the_first_step():
    weight = nn.Parameter(torch.zeros(2))
    assert not UpdateDerivative(optim.SGD([weight], momentum=0.9)).elementwise
    for kind in (optim.Adam, optim.AdamW, optim.RMSprop, optim.Adagrad):
        assert UpdateDerivative(kind([weight])).elementwise


class SubclassOfAdam(optim.Adam):
    pass


def test_a_registered_rule_is_used(monkeypatch):
    # Removed again after the test.
    monkeypatch.setitem(optimizers.DERIVATIVE_RULES, SubclassOfAdam, None)

    @derivative_rule(SubclassOfAdam)
    class RuleOfSubclass(DerivativeRule):
        elementwise = False

        def before(self, step):
            step.noted = step.parameter.item()

        def after(self, step):
            return 10 * step.noted + step.state["step"].item()

    weight = nn.Parameter(torch.tensor(3.0))
    weight.grad = torch.tensor(1.0)
    optimizer = SubclassOfAdam([weight])
    assert recorded_step(optimizer, UpdateDerivative(optimizer)) == [31.0]
    assert UpdateDerivative(optim.Adam([weight])).elementwise
