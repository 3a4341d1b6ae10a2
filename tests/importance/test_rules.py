"""The rule of every operation under every optimizer, against two oracles that know no formula.

They differ in where the gradients of the samples' losses come from, passes of single samples or one
pass of all (with dropout only that); both take them through the optimizer's own step by autograd.
"""

import copy
import gc
from dataclasses import replace

import networks
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from sampimp.errors import UnsupportedError
from sampimp.importance.recorder import ImportanceRecorder
from sampimp.importance.rules.inner_nodes import nodes_between
from sampimp.importance.rules.registry import RULES

N, CASES = networks.N, networks.CASES
LAYER = "MkldnnRnnLayerBackward0"
SCALE = torch.tensor([0.4, 1.3, -0.7], dtype=torch.float64)
"""Weights of the samples' losses; a mean or a sum is no more than that."""

# Of the copies in the oracles, which are no leaves, and of functions that vmap loops over.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute", "ignore:There is a perf"),
    pytest.mark.usefixtures("double_on_one_thread"),
]

OPTIMIZERS, moved_optimizer = oracles.OPTIMIZERS, oracles.moved_optimizer
recorded, weighted = networks.recorded, oracles.weighted


@pytest.mark.parametrize("name", CASES)
def test_no_tensor_outlives_its_step(name):
    """Python's garbage collector cannot see through a hook that holds what it is on."""
    torch.manual_seed(1)
    case = CASES[name]()
    optimizer = torch.optim.AdamW(case.model.parameters())
    recorder = ImportanceRecorder(case.model, optimizer, **case.options)
    gc.collect()
    gc.freeze()  # what is here already is not counted
    counts = []
    try:
        for epoch in (1, 2, 3):
            with recorder.step(range(N), epoch=epoch):
                optimizer.zero_grad()
                case.losses().sum().backward()
                optimizer.step()
            recorder.pop_epoch(epoch, N)
            gc.collect()
            counts.append(sum(isinstance(one, torch.Tensor) for one in gc.get_objects()))
    finally:
        gc.unfreeze()
    assert counts[2] == counts[1]


def assert_equal(got, want):
    """Assert equality to 1e-9 of each layer's largest value."""
    assert got.keys() == want.keys()
    error = {k: float((got[k] - b).abs().max() / b.max()) for k, b in want.items() if b.any()}
    assert all(one < 1e-9 for one in error.values()), error
    assert not any(got[layer].any() for layer in want.keys() - error.keys())


@pytest.fixture(scope="module", params=CASES)
def case(request):
    torch.manual_seed(1)
    return CASES[request.param]()


@pytest.fixture(scope="module")
def gradients(case):
    """By parameter (sample, ...): of every sample's loss in the pass of all."""
    return weighted(oracles.gradients_by_loss(case.model, case.losses()), SCALE)


def test_a_sample_of_the_batch_is_as_one_alone(case, gradients):
    """So that what the steps below are compared with is both oracles."""
    if case.random:
        pytest.skip("a pass of its own has other masks")
    each = [oracles.gradients_by_loss(case.model, case.losses(i)) for i in range(N)]
    alone = weighted({name: torch.cat([one[name] for one in each]) for name in gradients}, SCALE)
    for name, own in gradients.items():
        torch.testing.assert_close(own, alone[name], rtol=0, atol=1e-12 * float(own.abs().max()))


def check_step(case, optimizer, scale, gradients):
    before = copy.deepcopy(case.model.state_dict())
    moved = moved_optimizer(optimizer, case.model, gradients)
    want = oracles.importance_by_update(case.model, moved, gradients)
    assert_equal(recorded(case, moved, scale), want)
    case.model.load_state_dict(before)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_equals_the_oracle(case, gradients, optimizer):
    check_step(case, optimizer, SCALE, gradients)


HIDDEN = [
    name
    for name in CASES
    if name.startswith(("rnn", "lstm", "gru")) and "dropout" not in name and "proj" not in name
]


@pytest.fixture
def nothing_seen(monkeypatch):
    """Let autograd's graph show no inside, as on a GPU."""
    for function, rule in RULES.items():
        if rule.look is not None:
            monkeypatch.setitem(RULES, function, replace(rule, look=lambda *args: None))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("name", HIDDEN)
def test_a_layer_of_which_nothing_is_seen_is_gone_back_through(nothing_seen, name, optimizer):
    torch.manual_seed(1)
    case = CASES[name]()
    gradients = weighted(oracles.gradients_by_loss(case.model, case.losses()), SCALE)
    check_step(case, optimizer, SCALE, gradients)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.LSTM(4, 3, proj_size=2), "projections"),
        (nn.GRU(4, 3, num_layers=2, dropout=0.5), "dropout"),
    ],
)
def test_what_has_to_be_seen_and_is_not_is_an_error(nothing_seen, model, words):
    model, inputs = model.double(), torch.randn(5, N, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = ImportanceRecorder(model, optimizer, batch_dim=1)
    with pytest.raises(UnsupportedError, match=words), recorder.step(range(N), epoch=1):
        model(inputs)[0].square().sum().backward()


@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("bias", [True, False])
def test_an_lstm_in_single_precision_is_that_in_double(request, seen, dropout, bias):
    """In float32 its layers are oneDNN's, and one node each in autograd's graph."""
    if not seen:
        if dropout:
            pytest.skip("dropout has to be seen")
        request.getfixturevalue("nothing_seen")
    torch.manual_seed(1)
    rnn = nn.LSTM(4, 3, 2, bias=bias, batch_first=True, dropout=dropout, bidirectional=True)
    model = networks.Calls(networks.outputs_and_states, rnn=rnn, out=nn.Linear(6, 2)).float()
    case = networks.Case(model, torch.randn(N, networks.T, 4), random=True)
    case.model.float()
    case.inputs = tuple(one.float() for one in case.inputs)
    names = {node.name() for node in nodes_between(case.model(*case.inputs), (), {LAYER})}
    assert names == {LAYER}
    gradients = weighted(oracles.gradients_by_loss(case.model, case.losses()), SCALE.float())
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
    want = oracles.importance_by_update(case.model, optimizer, gradients)
    got = recorded(case, optimizer, SCALE.float())
    for layer, beta in want.items():
        torch.testing.assert_close(got[layer].double(), beta, rtol=1e-4, atol=1e-5 * beta.max())


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_checkpointed_recurrent_layer_is_exact(kind):
    torch.manual_seed(1)
    case = networks.Case(
        networks.Calls(
            lambda s, x: s.out(checkpoint(s.rnn, x, use_reentrant=False)[0]),
            rnn=kind(4, 3, batch_first=True),
            out=nn.Linear(3, 2),
        ),
        torch.randn(N, networks.T, 4),
    )
    gradients = weighted(oracles.gradients_by_loss(case.model, case.losses()), SCALE)
    check_step(case, "sgd", SCALE, gradients)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_oracle_is_the_derivative_of_the_whole_step(optimizer):
    """By the weights v, in one graph from the losses to the parameters after the update."""
    torch.manual_seed(1)
    case = networks.Case(networks.stack(), torch.randn(N, 4))
    gradients = weighted(oracles.gradients_by_loss(case.model, case.losses()), SCALE)
    moved = moved_optimizer(optimizer, case.model, gradients)
    want = oracles.importance_by_update(case.model, moved, gradients)

    leaves = {
        name: p.detach().clone().requires_grad_() for name, p in case.model.named_parameters()
    }
    sample_weights = torch.ones(N, requires_grad=True)
    output = torch.func.functional_call(case.model, leaves, case.inputs)
    loss = (sample_weights * SCALE * networks.losses(output)).sum()
    copies = {name: leaf.clone() for name, leaf in leaves.items()}
    own = torch.autograd.grad(loss, leaves.values(), create_graph=True)
    for after, gradient in zip(copies.values(), own, strict=True):
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


# Shapes, batch sizes and reductions.

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
        own = sorted(lengths[: len(x)], reverse=True)
        x = nn.utils.rnn.pack_padded_sequence(x, own, batch_first=True)
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
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_shape_size_and_reduction(cases, data):
    size, seed = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 99))
    build, optimizer = data.draw(cases), data.draw(st.sampled_from(list(OPTIMIZERS)))
    torch.manual_seed(seed)
    case = networks.Case(*build(size))
    scale = data.draw(
        st.sampled_from([torch.ones(size) / size, torch.ones(size), torch.rand(size)])
    )
    gradients = weighted(oracles.gradients_by_loss(case.model, case.losses()), scale)
    check_step(case, optimizer, scale, gradients)


# What is refused.


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
            r"mul_(.|\n)*write h = h \* gamma",
        ),
        (
            networks.Calls(times_in_place, l=nn.Linear(4, 4), a=networks.parameter(4)),
            torch.randn(N, 4).double(),
            r"mul_(.|\n)*write h = h \* gamma",
        ),
    ],
)
def test_what_has_no_exact_rule_is_an_error(model, inputs, words):
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


# Training is left as it is.


FAMILIES = {
    "mlp": lambda: (networks.stack(nn.Dropout(0.3)), torch.randn(6, 4)),
    "conv": lambda: (
        networks.convolutions(nn.GroupNorm(2, 4), nn.Dropout2d(0.3)),
        torch.randn(6, 2, 5, 4),
    ),
    **{
        kind.__name__.lower(): lambda kind=kind: (
            networks.Calls(
                lambda s, x: s.out(s.drop(s.rnn(x)[0])),
                rnn=kind(4, 3, num_layers=2, bidirectional=True, batch_first=True),
                drop=nn.Dropout(0.3),
                out=nn.Linear(6, 2),
            ),
            torch.randn(6, 5, 4),
        )
        for kind in (nn.RNN, nn.LSTM, nn.GRU)
    },
    "transformer": lambda: (
        nn.Sequential(networks.encoder_layer(dropout=0.3), nn.Linear(4, 3)),
        torch.randn(6, 5, 4),
    ),
    "attention to others": lambda: (
        networks.Calls(
            lambda s, x: s.a(x, x.tanh(), x.tanh())[0],
            a=nn.MultiheadAttention(4, 2, dropout=0.3, batch_first=True),
        ),
        torch.randn(6, 5, 4),
    ),
    "language model": lambda: (networks.Gpt(dropout=0.3), networks.tokens(6, networks.T)),
}


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("family", FAMILIES)
def test_trained_parameters_are_the_same_bits(family, optimizer):
    def train(recording):
        torch.manual_seed(1)
        model, inputs = FAMILIES[family]()
        model, inputs = model.float(), inputs.float() if inputs.is_floating_point() else inputs
        own = optimizer(model.parameters(), lr=0.05)
        recorder = ImportanceRecorder(model, own)

        def step(index):
            own.zero_grad()
            networks.losses(model(inputs[index])).mean().backward()
            own.step()

        for index in torch.arange(6).repeat(3).split(3):
            if recording:
                with recorder.step(index, epoch=1):
                    step(index)
            else:
                step(index)
        return [*model.parameters(), torch.get_rng_state()]

    for plain, recorded in zip(train(False), train(True), strict=True):
        assert torch.equal(plain, recorded)


@pytest.mark.parametrize("kind", [nn.Linear, nn.LSTM, nn.GRU, nn.RNN])
def test_autocast_is_as_exact_as_its_precision(kind):
    def beta(enabled):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 4), kind(4, 3)).float()
        inputs = torch.randn(networks.T, N, 4).float()
        optimizer = torch.optim.SGD(model.parameters(), lr=1)
        recorder = ImportanceRecorder(model, optimizer, batch_dim=1)
        with recorder.step(range(N), epoch=1):
            with torch.autocast("cpu", enabled=enabled):
                output = model(inputs)
            output = output if kind is nn.Linear else output[0]
            output.square().sum().backward()
            optimizer.step()
        return recorder.pop_epoch(1, N)

    torch.testing.assert_close(beta(True), beta(False), rtol=0.05, atol=0)  # bfloat16: 2^-8


# Other libraries, where they know the layer.

OTHERS = {
    "linear": lambda: (networks.stack(), torch.randn(5, 4)),
    "conv": lambda: (
        nn.Sequential(
            nn.Conv2d(2, 4, 2, stride=2, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 2), nn.Flatten()
        ),
        torch.randn(5, 2, 4, 5),
    ),
    "sequence": lambda: (
        nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3), nn.Flatten()),
        torch.randn(5, 3, 4),
    ),
    "embedding": lambda: (
        nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 3), nn.Flatten()),
        networks.tokens(5, 7),
    ),
    "group_norm": lambda: (
        nn.Sequential(nn.Conv1d(2, 4, 2), nn.GroupNorm(2, 4), nn.Flatten()),
        torch.randn(5, 2, 4),
    ),
}


def compared(name):
    """Return a model, a batch of it, and {layer: squared norms of gradients} by the recorder."""
    torch.manual_seed(1)
    model, inputs = OTHERS[name]()
    labels = torch.arange(5) % 3
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(twin.parameters(), lr=1)
    recorder = ImportanceRecorder(twin, optimizer)
    with recorder.step(range(5), epoch=1):
        functional.cross_entropy(twin(inputs), labels).backward()
        optimizer.step()
    got = dict(zip(recorder.layers, recorder.pop_epoch(1, 5), strict=True))
    return model, inputs, labels, got


def by_layer(squares):
    layers = {}
    for name, own in squares.items():
        layers[oracles.layer_of(name)] = layers.get(oracles.layer_of(name), 0) + own
    return layers


@pytest.mark.parametrize("name", ["linear", "conv"])
def test_backpack_finds_the_same_norms(name):
    backpack = pytest.importorskip("backpack")
    model, inputs, labels, got = compared(name)
    loss = backpack.extend(nn.CrossEntropyLoss())(backpack.extend(model)(inputs), labels)
    with backpack.backpack(backpack.extensions.BatchL2Grad()):
        loss.backward()
    assert_equal(got, by_layer({key: own.batch_l2 for key, own in model.named_parameters()}))


@pytest.mark.parametrize("name", OTHERS)
def test_opacus_finds_the_same_gradients(name):
    grad_sample = pytest.importorskip("opacus.grad_sample")
    model, inputs, labels, got = compared(name)
    wrapped = grad_sample.GradSampleModule(model, loss_reduction="sum")  # gradients as they are
    functional.cross_entropy(wrapped(inputs), labels).backward()
    named = model.named_parameters()
    squares = {key: own.grad_sample.square().flatten(1).sum(1) for key, own in named}
    assert_equal(got, by_layer(squares))
