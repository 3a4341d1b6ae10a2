"""Recording leaves training as it is, and is exact under autocast."""

import networks
import pytest
import torch
from networks import N
from torch import nn

from sampimp.importance.recorder import ImportanceRecorder

pytestmark = pytest.mark.usefixtures("double_on_one_thread")

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
def test_recording_leaves_parameters_equal_bit_for_bit(family, optimizer):
    def train(recording):
        torch.manual_seed(1)
        model, inputs = FAMILIES[family]()
        model, inputs = model.float(), inputs.float() if inputs.is_floating_point() else inputs
        trained_by = optimizer(model.parameters(), lr=0.05)
        recorder = ImportanceRecorder(model, trained_by)

        def step(index):
            trained_by.zero_grad()
            networks.losses(model(inputs[index])).mean().backward()
            trained_by.step()

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
