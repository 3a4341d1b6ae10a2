"""Rules of recurrent layers without inner nodes in autograd's graph, and in single precision."""

from dataclasses import replace

import networks
import oracles
import pytest
import torch
from networks import CASES, N
from rule_checks import SCALE, check_step
from torch import nn
from torch.utils.checkpoint import checkpoint

from sampimp.errors import UnsupportedError
from sampimp.importance.recorder import ImportanceRecorder
from sampimp.importance.rules.inner_nodes import nodes_between
from sampimp.importance.rules.registry import RULES

LAYER = "MkldnnRnnLayerBackward0"

pytestmark = [
    # From the oracles' copies, which are no leaves, and from operations without a vmap kernel.
    pytest.mark.filterwarnings("ignore:The .grad attribute", "ignore:There is a perf"),
    pytest.mark.usefixtures("double_on_one_thread"),
]

WITHOUT_GRAPH = [
    name
    for name in CASES
    if name.startswith(("rnn", "lstm", "gru")) and "dropout" not in name and "proj" not in name
]


@pytest.fixture
def hidden_graph(monkeypatch):
    """Hide the nodes inside operations, as on a GPU."""
    for function, rule in RULES.items():
        if rule.look is not None:
            monkeypatch.setitem(RULES, function, replace(rule, look=lambda *args: None))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("name", WITHOUT_GRAPH)
def test_without_the_graph_layers_are_backpropagated_again(hidden_graph, name, optimizer):
    torch.manual_seed(1)
    case = CASES[name]()
    gradients = oracles.weighted(oracles.gradients_by_loss(case.model, case.losses()), SCALE)
    check_step(case, optimizer, SCALE, gradients)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.LSTM(4, 3, proj_size=2), "projections"),
        (nn.GRU(4, 3, num_layers=2, dropout=0.5), "dropout"),
    ],
)
def test_layers_that_need_the_graph_are_refused_without_it(hidden_graph, model, words):
    model, inputs = model.double(), torch.randn(5, N, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = ImportanceRecorder(model, optimizer, batch_dim=1)
    with pytest.raises(UnsupportedError, match=words), recorder.step(range(N), epoch=1):
        model(inputs)[0].square().sum().backward()


@pytest.mark.parametrize("shown", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("bias", [True, False])
def test_an_lstm_in_single_precision_equals_one_in_double(request, shown, dropout, bias):
    """In float32 oneDNN computes each layer, as one node of autograd's graph."""
    if not shown:
        if dropout:
            pytest.skip("the masks of dropout are only in the graph")
        request.getfixturevalue("hidden_graph")
    torch.manual_seed(1)
    rnn = nn.LSTM(4, 3, 2, bias=bias, batch_first=True, dropout=dropout, bidirectional=True)
    model = networks.Calls(networks.outputs_and_states, rnn=rnn, out=nn.Linear(6, 2)).float()
    case = networks.Case(model, torch.randn(N, networks.T, 4), random=True)
    case.model.float()
    case.inputs = tuple(tensor.float() for tensor in case.inputs)
    names = {node.name() for node in nodes_between(case.model(*case.inputs), (), {LAYER})}
    assert names == {LAYER}
    gradients = oracles.weighted(
        oracles.gradients_by_loss(case.model, case.losses()), SCALE.float()
    )
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
    want = oracles.importance_by_update(case.model, optimizer, gradients)
    got = networks.recorded(case, optimizer, SCALE.float())
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
    gradients = oracles.weighted(oracles.gradients_by_loss(case.model, case.losses()), SCALE)
    check_step(case, "sgd", SCALE, gradients)
