"""The rule of every operation under every optimizer, against two oracles that use no formula.

The oracles differ in how they get the gradients of the samples' losses: from passes of single
samples, or from one pass of all samples (with dropout only from that). Both take the gradients
through the optimizer's own step by autograd.
"""

import gc

import networks
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import CASES, N
from rule_checks import SCALE, assert_equal, check_step
from torch import nn

from sampimp.errors import UnsupportedError
from sampimp.importance.recorder import ImportanceRecorder

pytestmark = [
    # From the oracles' copies, which are no leaves, and from operations without a vmap kernel.
    pytest.mark.filterwarnings("ignore:The .grad attribute", "ignore:There is a perf"),
    pytest.mark.usefixtures("double_on_one_thread"),
]


@pytest.mark.parametrize("name", CASES)
def test_no_tensor_outlives_its_step(name):
    """A hook that refers to its own tensor is a cycle that the garbage collector cannot see."""
    torch.manual_seed(1)
    case = CASES[name]()
    optimizer = torch.optim.AdamW(case.model.parameters())
    recorder = ImportanceRecorder(case.model, optimizer, **case.options)
    gc.collect()
    gc.freeze()  # objects that exist already are not counted
    counts = []
    try:
        for epoch in (1, 2, 3):
            with recorder.step(range(N), epoch=epoch):
                optimizer.zero_grad()
                case.losses().sum().backward()
                optimizer.step()
            recorder.pop_epoch(epoch, N)
            gc.collect()
            counts.append(sum(isinstance(value, torch.Tensor) for value in gc.get_objects()))
    finally:
        gc.unfreeze()
    assert counts[2] == counts[1]


@pytest.fixture(scope="module", params=CASES)
def case(request):
    torch.manual_seed(1)
    return CASES[request.param]()


@pytest.fixture(scope="module")
def gradients(case):
    """By parameter (sample, ...): gradients of weighted losses, from one pass of all samples."""
    return oracles.weighted(oracles.gradients_by_loss(case.model, case.losses()), SCALE)


def test_gradients_of_one_pass_equal_those_of_single_samples(case, gradients):
    """So the steps below are compared with both oracles."""
    if case.random:
        pytest.skip("a pass of its own has other masks")
    passes = [oracles.gradients_by_loss(case.model, case.losses(i)) for i in range(N)]
    alone = oracles.weighted(
        {name: torch.cat([gradient[name] for gradient in passes]) for name in gradients}, SCALE
    )
    for name, gradient in gradients.items():
        tolerance = 1e-12 * float(gradient.abs().max())
        torch.testing.assert_close(gradient, alone[name], rtol=0, atol=tolerance)


@pytest.mark.parametrize("optimizer", oracles.OPTIMIZERS)
def test_a_step_equals_the_oracle(case, gradients, optimizer):
    check_step(case, optimizer, SCALE, gradients)


@pytest.mark.parametrize("optimizer", oracles.OPTIMIZERS)
def test_the_oracle_is_the_derivative_of_the_whole_step(optimizer):
    """By the sample weights v, in one graph from the losses to the updated parameters."""
    torch.manual_seed(1)
    case = networks.Case(networks.stack(), torch.randn(N, 4))
    gradients = oracles.weighted(oracles.gradients_by_loss(case.model, case.losses()), SCALE)
    moved = oracles.moved_optimizer(optimizer, case.model, gradients)
    want = oracles.importance_by_update(case.model, moved, gradients)

    leaves = {
        name: p.detach().clone().requires_grad_() for name, p in case.model.named_parameters()
    }
    sample_weights = torch.ones(N, requires_grad=True)
    output = torch.func.functional_call(case.model, leaves, case.inputs)
    loss = (sample_weights * SCALE * networks.losses(output)).sum()
    copies = {name: leaf.clone() for name, leaf in leaves.items()}
    sums = torch.autograd.grad(loss, leaves.values(), create_graph=True)
    for after, gradient in zip(copies.values(), sums, strict=True):
        after.grad = gradient
    twin = type(moved)(copies.values(), differentiable=True)
    twin.load_state_dict(moved.state_dict())
    twin.param_groups[0]["differentiable"] = True
    twin.step()
    got = {layer: torch.zeros(N) for layer in want}
    for name, after in copies.items():
        for entry in after.flatten():
            (phi,) = torch.autograd.grad(entry, sample_weights, retain_graph=True)
            got[oracles.layer_of(name)] += phi.square()
    assert_equal(got, want)


# Random shapes, batch sizes and reductions.

SMALL = st.integers(1, 3)


@st.composite
def convolution_cases(draw):
    d, groups = draw(SMALL), draw(st.integers(1, 2))
    kernel, stride, dilation = (draw(st.tuples(*[st.integers(1, 2)] * d)) for _ in range(3))
    options = {
        "stride": stride,
        "dilation": dilation,
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    if draw(st.booleans()):
        extra = [draw(st.integers(0, max(s, a) - 1)) for s, a in zip(stride, dilation, strict=True)]
        kind, options["output_padding"] = networks.TRANSPOSED[d], extra
        size = st.integers(2, 4)
    else:
        kind, size = networks.CONVOLUTIONS[d], st.integers(3, 5)
        options["padding"] = [draw(st.integers(0, k)) for k in kernel]
    channels = [groups * draw(SMALL) for _ in range(2)]
    image = [draw(size) for _ in range(d)]
    return lambda n: (kind(*channels, kernel, **options), torch.randn(n, channels[0], *image))


@st.composite
def linear_cases(draw):
    sizes, positions = draw(st.tuples(SMALL, SMALL)), draw(st.lists(SMALL, max_size=3))
    return lambda n: (
        nn.Sequential(nn.Linear(sizes[0], 4), nn.LayerNorm(4), nn.Linear(4, sizes[1])),
        torch.randn(n, *positions, sizes[0]),
    )


@st.composite
def table_cases(draw):
    rows, width, positions = draw(st.integers(2, 5)), draw(SMALL), draw(st.lists(SMALL, max_size=2))
    padding = draw(st.none() | st.integers(-rows, rows - 1))
    return lambda n: (
        nn.Embedding(rows, width, padding_idx=padding),
        torch.randint(0, rows, (n, *positions)),
    )


@st.composite
def recurrent_cases(draw):
    kind, (inputs, units) = (
        draw(st.sampled_from([nn.RNN, nn.LSTM, nn.GRU])),
        draw(st.tuples(SMALL, SMALL)),
    )
    options = {
        "num_layers": draw(st.integers(1, 3)),
        "bidirectional": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "batch_first": True,
    }
    steps = draw(SMALL)
    lengths = draw(st.none() | st.lists(st.integers(1, steps), min_size=4, max_size=4))

    def run(model, x):
        if lengths is None:
            return model.rnn(x)[0]
        decreasing = sorted(lengths[: len(x)], reverse=True)
        x = nn.utils.rnn.pack_padded_sequence(x, decreasing, batch_first=True)
        return nn.utils.rnn.pad_packed_sequence(model.rnn(x)[0], batch_first=True)[0]

    return lambda n: (
        networks.Calls(run, rnn=kind(inputs, units, **options)),
        torch.randn(n, steps, inputs),
    )


@pytest.mark.parametrize(
    "cases",
    [linear_cases(), convolution_cases(), table_cases(), recurrent_cases()],
    ids=["linear", "convolution", "table", "recurrent"],
)
@settings(max_examples=25)
@given(data=st.data())
def test_any_shape_size_and_reduction(cases, data):
    size, seed = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 99))
    build, optimizer = data.draw(cases), data.draw(st.sampled_from(list(oracles.OPTIMIZERS)))
    torch.manual_seed(seed)
    case = networks.Case(*build(size))
    scale = data.draw(
        st.sampled_from([torch.ones(size) / size, torch.ones(size), torch.rand(size)])
    )
    gradients = oracles.weighted(oracles.gradients_by_loss(case.model, case.losses()), scale)
    check_step(case, optimizer, scale, gradients)


# Operations that are refused.


def times_in_place(s, x):
    h = s.l(x)
    h *= s.a
    return h


@pytest.mark.parametrize(
    ("model", "inputs", "words"),
    [
        (nn.EmbeddingBag(6, 4, mode="max"), networks.tokens(N, 2), 'mode "max"'),
        (nn.Embedding(6, 4, scale_grad_by_freq=True), networks.tokens(N, 2), "by_freq"),
        (nn.Conv1d(4, 3, 1), torch.randn(N + 1, 4, 5).double(), f"{N} samples"),
        (nn.GRU(4, 3, batch_first=True), torch.randn(5, N, 4).double(), f"{N} samples"),
        (
            networks.Calls(
                lambda s, x: s.l(x).mul_(s.a), l=nn.Linear(4, 4), a=networks.parameter(4)
            ),
            torch.randn(N, 4).double(),
            r"mul_(.|\n)*use h = h \* gamma",
        ),
        (
            networks.Calls(times_in_place, l=nn.Linear(4, 4), a=networks.parameter(4)),
            torch.randn(N, 4).double(),
            r"mul_(.|\n)*use h = h \* gamma",
        ),
    ],
)
def test_an_operation_without_an_exact_rule_is_an_error(model, inputs, words):
    model = model.double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = ImportanceRecorder(model, optimizer)

    def step():
        with recorder.step(range(N), epoch=1):
            output = model(inputs)
            (output if isinstance(output, torch.Tensor) else output[0]).square().sum().backward()
            optimizer.step()

    with pytest.raises(UnsupportedError, match=words):
        step()
