"""Gradients other than the sum of the samples', and models that change after the recorder is made.

In the first step of every epoch the sum of the samples' gradients is compared with the batch's.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional
from two_layers import D, N, TwoLayers, data, expected, record, squares

from sampimp.errors import UnsupportedError
from sampimp.importance.recorder import ImportanceRecorder

pytestmark = pytest.mark.usefixtures("double_on_one_thread")

MASK = torch.rand(D, D, generator=torch.Generator().manual_seed(5)).round()


def halve(values):
    values.mul_(0.5)


HOOKS = {
    "on the parameter": lambda p: p.register_hook(lambda gradient: gradient * 0.5),
    "after accumulation": lambda p: p.register_post_accumulate_grad_hook(lambda p: halve(p.grad)),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_gradient_changed_by_a_hook_is_refused(hook):
    net = TwoLayers(lambda h: h)
    HOOKS[hook](net.a.weight)
    with pytest.raises(
        UnsupportedError, match=r"the sum of the samples'.*\n.*differs from the sum by \d+"
    ):
        record(net, lambda z: squares(z).mean(), data(N, D))


def test_hook_that_changes_only_a_later_gradient_is_refused():
    net = TwoLayers(lambda h: h)
    net.a.weight.register_hook(lambda gradient: gradient.clamp(-10, 10))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    recorder = ImportanceRecorder(net, optimizer)

    def step(scale):
        with recorder.step(range(N), epoch=1):
            optimizer.zero_grad()
            (scale * squares(net(data(N, D))).mean()).backward()
            optimizer.step()

    step(1.0)
    with pytest.raises(UnsupportedError, match="the sum of the samples'"):
        step(1000.0)


def test_hook_on_a_parameter_with_a_penalty_is_refused():
    net = TwoLayers(lambda h: h)
    net.a.weight.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))
    with pytest.raises(UnsupportedError, match="no hook on a parameter with a penalty"):
        record(net, lambda z: squares(z).mean() + net.a.weight.square().sum(), data(N, D))


def test_factors_in_one_tensor_that_is_filled_anew():
    net, x = TwoLayers(lambda h: h), data(N, D)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    recorder, factor = ImportanceRecorder(net, optimizer), torch.ones(())
    want = expected(net, squares(net(x)) / N)
    with recorder.step(range(N), epoch=1):
        squares(net(x)).mean().backward()
        for scale, layer in ((2.0, net.a), (3.0, net.b)):
            factor.fill_(scale)
            for parameter in layer.parameters():
                parameter.grad.mul_(factor)
        optimizer.step()
    recorded = dict(zip(recorder.layers, recorder.pop_epoch(1, N), strict=True))
    torch.testing.assert_close(recorded["a"], 4 * want["a"])
    torch.testing.assert_close(recorded["b"], 9 * want["b"])


def test_step_pre_hook_that_is_registered_inside_the_block_is_refused():
    net = TwoLayers(lambda h: h)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    recorder = ImportanceRecorder(net, optimizer)

    def step():
        with recorder.step(range(N), epoch=1):
            squares(net(data(N, D))).mean().backward()
            optimizer.register_step_pre_hook(lambda *_: halve(net.a.weight.grad))
            optimizer.step()

    with pytest.raises(UnsupportedError, match="step pre-hook that was registered inside"):
        step()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda gradient: halve(gradient.data), "the sum of the samples'"),
        (lambda gradient: gradient.mul_(torch.rand(D, 1)), "otherwise than by a factor"),
        (lambda gradient: gradient.div_(2, rounding_mode="floor"), "otherwise than by a factor"),
    ],
)
def test_gradient_changed_before_the_update_is_refused(change, words):
    net = TwoLayers(lambda h: h)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    recorder = ImportanceRecorder(net, optimizer)

    def step():
        with recorder.step(range(N), epoch=1):
            squares(net(data(N, D))).mean().backward()
            change(net.a.weight.grad)
            optimizer.step()

    with pytest.raises(UnsupportedError, match=words):
        step()


def test_factor_and_penalty_are_accepted():
    net = TwoLayers(lambda h: h)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    recorder = ImportanceRecorder(net, optimizer)
    with recorder.step(range(N), epoch=1):
        penalty = 0.1 * net.a.weight.square().sum()
        (squares(net(data(N, D))).mean() + penalty).backward()
        net.b.weight.grad.mul_(torch.tensor(1e-6))
        optimizer.step()


def test_layer_replaced_after_the_recorder_is_made_is_refused():
    net = TwoLayers(lambda h: h)
    recorder = ImportanceRecorder(net, torch.optim.SGD(net.parameters(), lr=0.1))
    net.b = nn.Linear(D, 2)
    with (
        pytest.raises(UnsupportedError, match="when the model has all its layers"),
        recorder.step(range(N), epoch=1),
    ):
        pass


def test_buffer_replaced_after_the_recorder_is_made_is_no_data():
    """As by `model.double()`, here with a mask of as many rows as there are samples."""
    net, x = TwoLayers(lambda h: h), data(D, D)
    net.register_buffer("mask", MASK.clone())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    recorder = ImportanceRecorder(net, optimizer)
    net.mask = net.mask.clone()
    with recorder.step(range(D), epoch=1):
        squares(net.b(functional.linear(x, net.a.weight * net.mask))).mean().backward()
        optimizer.step()
    assert recorder.pop_epoch(1, D).isfinite().all()
