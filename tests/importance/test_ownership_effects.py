"""A proof leaves training as it was, also beside other recorders; and what a result reports."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from two_layers import D, N, TwoLayers, assert_same, data, expected, squares

from sampimp.errors import ConfigError
from sampimp.importance.recorder import ImportanceRecorder

pytestmark = pytest.mark.usefixtures("double_on_one_thread")


class Counting(nn.Module):
    """A layer that draws random numbers and counts its calls, which a checkpoint repeats."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(D, D)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, h):
        self.calls += 1
        return functional.dropout(self.linear(h), 0.5)


def test_proof_leaves_parameters_buffers_and_random_state():
    def run(records):
        torch.manual_seed(1)
        net = nn.Sequential(Counting(), nn.Linear(D, 2))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        recorder = ImportanceRecorder(net, optimizer)
        net[1].weight.register_hook(lambda g: g * torch.rand(()).clamp(1.0, 1.0))
        for step in range(3):
            index = range(step * N, (step + 1) * N)
            with recorder.step(index, epoch=1) if records else nullcontext():
                optimizer.zero_grad()
                h = checkpoint(net[0], data(N, D), use_reentrant=False)
                squares(net[1](h)).mean().backward()
                optimizer.step()
        return [*net.state_dict().values(), torch.get_rng_state()]

    assert all(map(torch.equal, run(True), run(False)))


def test_two_recorders_of_one_model_both_record():
    net, x = TwoLayers(lambda h: h), data(N, D)
    want = expected(net, squares(net(x)) / N)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    recorders = [ImportanceRecorder(net, optimizer) for _ in range(2)]
    with recorders[0].step(range(N), epoch=1), recorders[1].step(range(N), epoch=1):
        squares(net(x)).mean().backward()
        optimizer.step()
    for recorder in recorders:
        assert_same(dict(zip(recorder.layers, recorder.pop_epoch(1, N), strict=True)), want)


def test_recorders_of_two_models_in_a_chain_both_record():
    first, second = nn.Linear(D, D), nn.Linear(D, 2)
    both = nn.Sequential(first, nn.Tanh(), second)
    x = data(N, D)
    want = expected(both, both(x).square().sum(1) / N)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (first, second)]
    recorders = [
        ImportanceRecorder(model, optimizer)
        for model, optimizer in zip((first, second), optimizers, strict=True)
    ]
    with recorders[0].step(range(N), epoch=1), recorders[1].step(range(N), epoch=1):
        both(x).square().sum(1).mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    for recorder, layer in zip(recorders, ("0", "2"), strict=True):
        torch.testing.assert_close(recorder.pop_epoch(1, N)[0], want[layer], rtol=1e-9, atol=0)


def test_backward_pass_that_reaches_no_layer_is_ignored():
    """Of adversarial training, where the discriminator's pass does not reach the generator."""
    net, judge, x = TwoLayers(lambda h: h), nn.Linear(2, 1), data(N, D)
    want = expected(net, judge(net(x)).square().sum(1) / N)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    recorder = ImportanceRecorder(net, optimizer)
    with recorder.step(range(N), epoch=1):
        z = net(x)
        judge(z.detach()).square().mean().backward()
        judge(z).square().sum(1).mean().backward()
        optimizer.step()
    assert_same(dict(zip(recorder.layers, recorder.pop_epoch(1, N), strict=True)), want)


def test_retained_gradient_is_that_of_the_users_pass():
    def run(records):
        net = TwoLayers(lambda h: h)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        recorder = ImportanceRecorder(net, optimizer)
        with recorder.step(range(N), epoch=1) if records else nullcontext():
            z = net(data(N, D))
            z.retain_grad()
            squares(z).mean().backward()
            optimizer.step()
        return z.grad

    assert torch.equal(run(True), run(False))


def test_layer_of_another_optimizer_has_no_importance():
    net, x = TwoLayers(lambda h: h), data(N, D)
    want = expected(net, squares(net(x)) / N)
    first = torch.optim.SGD(net.a.parameters(), lr=0.1)
    second = torch.optim.Adam([*net.b.parameters(), net.gamma])
    recorder = ImportanceRecorder(net, first)

    def step():
        with recorder.step(range(N), epoch=1):
            squares(net(x)).mean().backward()
            second.step()
            first.step()

    with pytest.warns(UserWarning, match="Adam also updates b"):
        step()
    result = recorder.to_dataset().importance.sel(epoch=1)
    torch.testing.assert_close(torch.tensor(result.sel(layer="a").values), want["a"].float())
    assert result.sel(layer="b").isnull().all()


@pytest.mark.parametrize("first", [0, 1])
def test_step_that_is_not_finite_is_reported(first):
    net, x = TwoLayers(lambda h: h), data(N, D)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    recorder = ImportanceRecorder(net, optimizer)
    for step in range(2):
        with recorder.step(range(step * N, step * N + N), epoch=1):
            optimizer.zero_grad()
            (squares(net(x)).mean() * (float("nan") if step >= first else 1)).backward()
            optimizer.step()
    result = recorder.to_dataset().importance
    assert result.attrs["not_finite_epochs"] == [1]
    assert result.sel(epoch=1, layer="a")[first * N :].isnull().all()


def test_learning_rate_tensor_is_written(tmp_path):
    net = TwoLayers(lambda h: h)
    optimizer = torch.optim.SGD(net.parameters(), lr=torch.tensor(0.1))
    recorder = ImportanceRecorder(net, optimizer)
    with recorder.step(range(N), epoch=1):
        squares(net(data(N, D))).mean().backward()
        optimizer.step()
    result = recorder.to_dataset()
    assert result.importance.attrs["learning_rate"] == pytest.approx(0.1)
    result.to_zarr(tmp_path / "result.zarr")


def test_sample_names_are_refused_with_advice():
    net = TwoLayers(lambda h: h)
    recorder = ImportanceRecorder(net, torch.optim.SGD(net.parameters(), lr=0.1))
    with (
        pytest.raises(ConfigError, match=r"whole numbers(.|\n)*enumerate"),
        recorder.step([f"image-{i}" for i in range(N)], epoch=1),
    ):
        pass


def test_large_identifiers_are_refused_with_advice():
    net = TwoLayers(lambda h: h)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    recorder = ImportanceRecorder(net, optimizer)
    with recorder.step([10**13 + i for i in range(N)], epoch=1):
        squares(net(data(N, D))).mean().backward()
        optimizer.step()
    with pytest.raises(ConfigError, match=r"6 samples(.|\n)*return_inverse"):
        recorder.to_dataset()
