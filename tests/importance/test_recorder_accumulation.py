"""Steps of several backward passes, closures, and factors on the gradients between passes."""

import contextlib
import copy

import oracles
import pytest
import torch
from recording import SGD, FunctionModel, batch, sample_losses
from torch import nn
from torch.nn import functional

import sampimp.importance.optimizers
from sampimp.errors import ConfigError, UnsupportedError
from sampimp.importance.recorder import ImportanceRecorder
from sampimp.training.models import flatten_parameters

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("make", [SGD, torch.optim.AdamW], ids=["SGD", "AdamW"])
def test_accumulated_gradients_are_those_of_one_batch(make):
    (inputs, labels), betas = batch(samples=7), []
    for parts in ([7], [3, 4]):
        model = oracles.tiny_mlp()
        optimizer = make(model.parameters(), lr=0.2)
        recorder = ImportanceRecorder(model, optimizer)
        for epoch in (1, 2):
            index = torch.arange(7).split(parts)
            with recorder.step(index, epoch=epoch):
                optimizer.zero_grad()
                for rows in index:
                    (sample_losses(model, inputs[rows], labels[rows]).sum() / 7).backward()
                optimizer.step()
        betas.append(recorder.pop_epoch(2, 7))
    assert oracles.close(betas[1], betas[0], scale=1e-6 * betas[0].amax())


@pytest.mark.parametrize("make", [SGD, torch.optim.AdamW], ids=["SGD", "AdamW"])
def test_an_index_may_be_added_before_each_pass(make):
    (inputs, labels), betas = batch(samples=9), []
    parts = torch.arange(9).split(
        [2, 4, 3]
    )  # they need more room than the buffer of the first pass has
    for early in (True, False):
        model = oracles.tiny_mlp()
        optimizer = make(model.parameters(), lr=0.2)
        recorder = ImportanceRecorder(model, optimizer)
        for epoch in (1, 2):
            with recorder.step(parts if early else parts[0], epoch=epoch) as add_pass:
                optimizer.zero_grad()
                for number, rows in enumerate(parts):
                    if number and not early:
                        add_pass(rows)
                    (sample_losses(model, inputs[rows], labels[rows]).sum() / 9).backward()
                optimizer.step()
        betas.append(recorder.pop_epoch(2, 9))
    assert (betas[0] > 0).all()
    assert torch.equal(betas[1], betas[0])


@pytest.mark.parametrize(
    ("backward_first", "rows", "error", "words"),
    [
        (False, [2, 3], UnsupportedError, "1 backward passes before one more batch\n +Got 0"),
        (True, [1, 2], ConfigError, "1 repeated"),
        (True, [2, -3], ConfigError, "smallest -3"),
    ],
)
def test_a_pass_that_cannot_be_added_is_refused(backward_first, rows, error, words):
    model, (inputs, labels) = oracles.tiny_mlp(), batch()
    recorder = ImportanceRecorder(model, SGD(model.parameters(), lr=0.2))

    def step():
        with recorder.step([0, 1], epoch=1) as add_pass:
            loss = sample_losses(model, inputs[:2], labels[:2]).mean()
            if backward_first:
                loss.backward()
            add_pass(rows)

    with pytest.raises(error, match=words):
        step()


@pytest.mark.parametrize("zero", ["before", "in the closure"])
@pytest.mark.parametrize("recorders", [1, 2])
@pytest.mark.parametrize("make", [SGD, torch.optim.AdamW], ids=["SGD", "AdamW"])
def test_a_closure_is_the_same_step(make, recorders, zero):
    inputs, labels = batch()
    betas, trained = [], []
    for closure in (True, False):
        model = oracles.tiny_mlp()
        optimizer = make(model.parameters(), lr=0.2)
        all_recorders = [ImportanceRecorder(model, optimizer) for _ in range(recorders)]
        for epoch in (1, 2):

            def run(model=model, optimizer=optimizer, inside=zero != "before"):
                if inside:
                    optimizer.zero_grad()
                loss = sample_losses(model, inputs, labels).mean()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
                return loss

            with contextlib.ExitStack() as steps:
                for recorder in all_recorders:
                    steps.enter_context(recorder.step(range(6), epoch=epoch))
                if zero == "before":
                    optimizer.zero_grad()
                if closure:
                    assert optimizer.step(run).item() > 0  # the loss, as without the recorder
                else:
                    run()
                    optimizer.step()
        betas += [recorder.pop_epoch(2, 6) for recorder in all_recorders]
        trained.append(flatten_parameters(model))
    assert (betas[0] > 0).all()
    assert all(torch.equal(beta, betas[0]) for beta in betas)
    assert torch.equal(*trained)


class Twice(SGD):
    """Evaluates its closure twice, as a line search does."""

    @torch.no_grad()
    def step(self, closure):
        for _ in range(2):
            with torch.enable_grad():
                closure()
        for parameter in self.param_groups[0]["params"]:
            parameter -= self.param_groups[0]["lr"] * parameter.grad


def test_a_closure_that_is_evaluated_twice_is_refused(monkeypatch):
    monkeypatch.setitem(
        sampimp.importance.optimizers.DERIVATIVE_RULES,
        Twice,
        sampimp.importance.optimizers.SGDRule(),
    )
    model, (inputs, labels) = oracles.tiny_mlp(), batch()
    optimizer = Twice(model.parameters(), lr=0.2)
    recorder = ImportanceRecorder(model, optimizer)

    def run():
        optimizer.zero_grad(set_to_none=False)
        sample_losses(model, inputs, labels).mean().backward()

    before = flatten_parameters(model)
    with (
        pytest.raises(
            UnsupportedError, match=r"1 backward passes in the step\n +Got another backward pass"
        ),
        recorder.step(range(6), epoch=1),
    ):
        optimizer.step(closure=run)
    assert torch.equal(flatten_parameters(model), before)


def accumulated(between, make=SGD):
    """Return beta of two passes over three samples each; call `between` after the first one."""
    model, (inputs, labels) = oracles.tiny_mlp(), batch()
    optimizer = make(model.parameters(), lr=0.2)
    recorder = ImportanceRecorder(model, optimizer)
    with recorder.step([[0, 1, 2], [3, 4, 5]], epoch=1):
        sample_losses(model, inputs[:3], labels[:3]).mean().backward()
        between(model, inputs)
        sample_losses(model, inputs[3:], labels[3:]).mean().backward()
        optimizer.step()
    return recorder.pop_epoch(1, 6)


def test_a_factor_between_two_passes_is_on_the_first_alone():
    def halve(model, _):
        for parameter in model.parameters():
            parameter.grad.mul_(0.5)

    plain, halved = accumulated(lambda *_: None), accumulated(halve)
    assert oracles.close(halved[:, :3], 0.25 * plain[:, :3])
    assert oracles.close(halved[:, 3:], plain[:, 3:])


@pytest.mark.parametrize(
    "between",
    [
        lambda model, _: nn.utils.clip_grad_value_(model.parameters(), 1e-3),
        lambda model, _: model.zero_grad(set_to_none=False),
        lambda model, _: model[0].weight.grad.add_(1.0),
        lambda model, _: setattr(
            model[0].weight, "grad", torch.ones_like(model[0].weight, requires_grad=False)
        ),
    ],
    ids=["values clipped", "zeroed", "noise", "another"],
)
def test_gradients_changed_between_two_passes_are_refused(between):
    with pytest.raises(UnsupportedError, match=r"a changed gradient|from elsewhere"):
        accumulated(between)


def test_a_batch_that_is_filled_again_before_the_update_is_refused_where_it_is_needed():
    def refill(_, inputs):
        inputs[:3] += 1

    accumulated(refill)  # under SGD, the norms were computed in the backward pass
    with pytest.raises(UnsupportedError, match="changed in place after its backward pass"):
        accumulated(refill, torch.optim.AdamW)


SCALED = {
    "norm clipped": lambda model: nn.utils.clip_grad_norm_(model.parameters(), 1e-3),
    "last layer clipped": lambda model: nn.utils.clip_grad_norm_(model[2].parameters(), 1e-3),
    "a bias scaled": lambda model: model[2].bias.grad.mul_(0.5),
    "all divided": lambda model: [p.grad.div_(3) for p in model.parameters()],
    "twice": lambda model: [p.grad.mul_(2).mul_(0.3) for p in model.parameters()],
    "one dropped": lambda model: setattr(model[2].weight, "grad", None),
}


@pytest.mark.parametrize("name", SCALED)
def test_a_factor_on_the_gradients_is_part_of_the_update(name):
    model, (inputs, labels) = oracles.tiny_mlp(), batch()
    optimizer = SGD(model.parameters(), lr=0.2)
    before = {}
    recorder = ImportanceRecorder(model, optimizer)
    with recorder.step(range(6), epoch=4):
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), labels).backward()
        before = {id(p): p.grad.clone() for p in model.parameters()}
        SCALED[name](model)
        factors = [
            0.0 if p.grad is None else float(p.grad.norm() / before[id(p)].norm())
            for p in model.parameters()
        ]
        state = copy.deepcopy(model)
        optimizer.step()
    expected = torch.zeros(2, 6, dtype=torch.float64)
    for i in range(6):
        loss = functional.cross_entropy(state(inputs[[i]]), labels[[i]]) / 6
        gradients = torch.autograd.grad(loss, list(state.parameters()))
        for n, (factor, gradient) in enumerate(zip(factors, gradients, strict=True)):
            expected[n // 2, i] += (0.2 * factor * gradient).square().sum()
    assert oracles.close(recorder.pop_epoch(4, 6), expected, relative=1e-9)


@pytest.mark.parametrize("overflows", [False, True])
def test_a_grad_scaler_changes_nothing_or_leaves_the_step_out(overflows):
    model, (inputs, labels) = oracles.tiny_mlp().float(), batch(dtype=torch.float32)
    if overflows:
        inputs[0, 0] = torch.inf
    optimizer = SGD(model.parameters(), lr=0.2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    expected = oracles.importance_by_autograd(model, optimizer, inputs, labels)
    before = flatten_parameters(model)
    recorder = ImportanceRecorder(model, optimizer)
    with recorder.step(range(6), epoch=1):
        scaler.scale(sample_losses(model, inputs, labels).mean()).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        scaler.step(optimizer)
        scaler.update()
    beta = recorder.pop_epoch(1, 6)
    if overflows:
        assert torch.equal(flatten_parameters(model), before)
        assert (beta[:, 1:] == 0).all()
    else:
        assert oracles.close(beta, expected, relative=1e-4)


def test_a_pass_without_samples_adds_none():
    model = FunctionModel(
        lambda m, x: m.out(m.conv(x).mean(2)), conv=nn.Conv1d(4, 5, 2), out=nn.Linear(5, 3)
    ).double()
    recorder = ImportanceRecorder(model, optimizer := SGD(model.parameters(), lr=0.1))
    inputs = torch.empty(0, 4, 6).double()
    with recorder.step([], epoch=1):
        model(inputs).sum().backward()
        optimizer.step()
    assert recorder.pop_epoch(1, 2).isnan().all()


def test_passes_that_overlap_are_refused():
    model, (inputs, labels) = oracles.tiny_mlp(), batch()
    recorder = ImportanceRecorder(model, SGD(model.parameters(), lr=0.1))

    def step():
        with recorder.step([[0, 1, 2], [3, 4, 5]], epoch=1):
            losses = [
                functional.cross_entropy(model(inputs[some]), labels[some])
                for some in (slice(3), slice(3, 6))
            ]
            for loss in losses:
                loss.backward()

    with pytest.raises(UnsupportedError, match="one batch after the other"):
        step()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_both_ways_to_zero_gradients_are_exact(set_to_none):
    model, (inputs, labels) = oracles.tiny_mlp(), batch()
    optimizer = SGD(model.parameters(), lr=0.2)
    recorder = ImportanceRecorder(model, optimizer)
    for epoch in (1, 2, 3):
        expected = oracles.importance_by_autograd(model, optimizer, inputs, labels)
        with recorder.step(range(6), epoch=epoch):
            optimizer.zero_grad(set_to_none=set_to_none)
            functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
        assert oracles.close(recorder.pop_epoch(epoch, 6), expected)
