"""Ordinary and odd loops: the influence is the derivative of the loop, or there is a named error.

The oracle trains each loop again with the weight of one sample changed, and knows nothing of the
reverse pass. The errors are those of loops whose exact derivative autograd does not have, and of
replays that are not the recorded loop.
"""

from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from sampimp import ImportanceRecorder, RecordedLoop, ReversePass
from sampimp.errors import UserError

pytestmark = pytest.mark.usefixtures("double_precision")

SAMPLES = 8
INPUTS = torch.randn(SAMPLES + 5, 4, generator=torch.Generator().manual_seed(1)).double()
LABELS = torch.tensor([0, 2, 1, 1, 0, 2, 2, 0])
TEST_LABELS = torch.tensor([0, 1, 2, 0, 1])
SGD, ADAM = torch.optim.SGD, partial(torch.optim.Adam, eps=1e-3)


class Built(nn.Module):
    """A model of parts, with a function for its forward pass."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs):
        return self.function(self, *inputs)


def network(between=None, **parts):
    """Return two layers with tanh, and a function of the hidden layer after it."""

    def forward(model, inputs):
        hidden = model.first(inputs).tanh()
        return model.last(between(model, hidden) if between else hidden)

    return Built(forward, first=nn.Linear(4, 6), last=nn.Linear(6, 3), **parts)


class Pattern:
    """A loop of two epochs, each of two steps; options say how it differs from a plain one."""

    def __init__(self, build=network, optimizer=SGD, settings=None, **options):
        self.model = build()
        make_groups = options.pop("groups", lambda model: model.parameters())
        settings = deepcopy({"lr": 0.1, **(settings or {})})  # a schedule changes a tensor in place
        self.optimizer = optimizer(make_groups(self.model), **settings)
        make_scheduler = options.pop("scheduler", None)
        self.scheduler = make_scheduler(self.optimizer) if make_scheduler else None
        self.losses = options.pop("losses", self.losses)
        self.target = options.pop("target", self.target)
        self.reduce = options.pop("reduce", lambda _model, losses, _index: losses.mean())
        self.before_epoch = options.pop("before_epoch", lambda _model, _epoch: None)
        self.before_step = options.pop("before_step", lambda _model, _number: None)
        self.after_step = options.pop("after_step", lambda _model: None)
        self.before_pass = options.pop("before_pass", lambda _model: None)
        self.clip, self.steps = options.pop("clip", None), options.pop("steps", 2)
        self.set_to_none = options.pop("set_to_none", True)
        self.passes = options.pop("passes", lambda batch: [batch])
        self.options = options

    def losses(self, model, index):
        return functional.cross_entropy(
            model(INPUTS[:SAMPLES][index]), LABELS[index], reduction="none"
        )

    def target(self, model):
        return functional.cross_entropy(model(INPUTS[SAMPLES:]), TEST_LABELS)

    def state(self):
        return deepcopy(
            {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        )

    def train(self, weights=None):
        """Train; record if no weights are given."""
        recorder = ImportanceRecorder(self.model, self.optimizer, keep_steps=True)
        starts, generator, number = {}, torch.Generator().manual_seed(5), 0
        for epoch in (0, 1):
            self.before_epoch(self.model, epoch)
            starts[epoch] = self.state()
            for batch in torch.randperm(SAMPLES, generator=generator).chunk(self.steps):
                self.before_step(self.model, number)
                number += 1
                passes = self.passes(batch)
                if weights is None:
                    with recorder.step(passes, epoch=epoch):
                        self.step(passes, None)
                else:
                    self.step(passes, weights)
                self.after_step(self.model)
                if self.scheduler:
                    self.scheduler.step()
        starts[2] = self.state()
        return recorder.steps, starts

    def step(self, passes, weights):
        self.model.zero_grad(self.set_to_none)
        for index in passes:
            losses = self.losses(self.model, index.numpy())
            losses = losses if weights is None else losses * weights[index]
            (self.reduce(self.model, losses, index) / len(passes)).backward()
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()

    def reverse(self, memory=2**20):
        """Return the recorded loop and its influence, summed over epochs and layers."""
        steps, starts = self.train()
        self.before_pass(self.model)
        run = RecordedLoop(
            self.model,
            self.optimizer,
            steps,
            self.losses,
            starts,
            clip_norm=self.clip,
            **self.options,
        )
        result = ReversePass(run, {"test": self.target}, memory=memory).to_dataset()
        return starts, result["influence"].sel(target="test").sum(["epoch", "layer"]).values

    def value(self):
        self.model.eval()
        with torch.no_grad():
            return float(self.target(self.model))


def scaled():
    """Return a model with a parameter without axes."""
    return network(
        lambda model, hidden: hidden * model.scale, scale=nn.Parameter(torch.tensor(0.7))
    )


def counted():
    """Return a model whose activations shrink with the number of training batches."""

    def shrink(model, hidden):
        model.count += int(model.training)
        return hidden / (1 + 0.3 * model.count)

    model = network(shrink)
    model.register_buffer("count", torch.tensor(0))
    return model


def with_branch():
    """Return a model of which some batches do not use one layer."""

    def add(model, hidden):
        return hidden + model.branch(hidden) if float(hidden[0, 0].detach() > 0) else hidden

    return network(add, branch=nn.Linear(6, 6))


def sparse():
    """Return a model with a table whose gradients are sparse."""

    def look_up(model, hidden):
        return hidden + model.table((hidden[:, 0] > 0).long())

    return network(look_up, table=nn.Embedding(2, 6, sparse=True))


def dropped():
    return network(lambda model, hidden: model.dropout(hidden), dropout=nn.Dropout(0.5))


def freeze(is_frozen):
    def before_epoch(model, epoch):
        model.first.requires_grad_(not is_frozen(epoch))

    return before_epoch


def parts_of(batch):
    return [batch[:3], batch[3:]]


MOMENTUM = {"momentum": 0.9}
RIGHT = {
    "a parameter without axes, clipped, Adam": partial(
        Pattern, scaled, ADAM, {"lr": 0.01}, clip=0.3
    ),
    "an embedding with sparse gradients": partial(Pattern, sparse),
    "all samples in one batch": partial(Pattern, steps=1),
    "accumulated batches of two sizes": partial(Pattern, passes=parts_of),
    "a rate that is a tensor, and a schedule": partial(
        Pattern,
        settings={"lr": torch.tensor(0.1), **MOMENTUM},
        scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7),
    ),
    "modes that change from step to step": partial(
        Pattern, dropped, before_step=lambda model, number: model.train(number % 2 == 0)
    ),
    "evaluation mode when the pass begins": partial(
        Pattern, dropped, before_pass=lambda model: model.eval()
    ),
    "a layer that some batches do not use": partial(Pattern, with_branch, settings=MOMENTUM),
    "zeros where a batch does not use a layer": partial(
        Pattern, with_branch, settings={**MOMENTUM, "weight_decay": 0.1}, set_to_none=False
    ),
    "a layer that is trained from the second epoch on": partial(
        Pattern, settings=MOMENTUM, before_epoch=freeze(lambda epoch: epoch == 0)
    ),
    "a layer that is frozen in the second epoch": partial(
        Pattern,
        settings=MOMENTUM,
        before_epoch=freeze(lambda epoch: epoch == 1),
        before_pass=lambda model: model.requires_grad_(True),
    ),
    "a parameter in no group": partial(Pattern, groups=lambda model: model.last.parameters()),
    "a count of batches in a buffer": partial(Pattern, counted, ADAM, {"lr": 0.01}),
}


@pytest.mark.parametrize("name", RIGHT)
def test_influence_is_the_derivative(name):
    torch.manual_seed(0)
    pattern = RIGHT[name]()
    starts, actual = pattern.reverse(memory=1)  # segments of one step
    size, largest = 1e-4, np.abs(actual).max()
    for sample in (2, 7):
        expected = 0.0
        for steps, factor in ((1, 8), (-1, -8), (2, -1), (-2, 1)):
            torch.manual_seed(0)
            weights = torch.ones(SAMPLES)
            weights[sample] += steps * size
            other = RIGHT[name]()
            other.train(weights)
            expected += factor * other.value() / (12 * size)
        assert actual[sample] == pytest.approx(expected, abs=1e-7 * largest)
    stored = starts[2]["model"]
    assert all(torch.equal(v, stored[k]) for k, v in pattern.model.state_dict().items())


def test_momentum_that_ends_before_the_last_epoch():
    torch.manual_seed(0)

    def without(model, epoch):
        pattern.optimizer.param_groups[0]["momentum"] = 0.9 if epoch == 0 else 0.0

    pattern = Pattern(settings=MOMENTUM, before_epoch=without)
    _, actual = pattern.reverse()
    assert np.isfinite(actual).all()
    assert np.abs(actual).max() > 0


def cut(function):
    """Return losses that a function of the logits weighs."""

    def losses(model, index):
        logits = model(INPUTS[:SAMPLES][index])
        weights = function(logits)
        return functional.cross_entropy(logits, LABELS[index], reduction="none") * weights

    return {"losses": losses}


def without_gradient(logits):
    with torch.no_grad():
        return logits.square().mean(1)


def hard(model, hidden):
    return functional.gumbel_softmax(hidden, hard=True) * torch.arange(6.0)


def running_mean(model, hidden):
    if not model.training:
        return hidden - model.mean
    with torch.no_grad():
        model.mean.mul_(0.9).add_(0.1 * hidden.mean(0))
    return hidden


def kept_mean(model, hidden):
    """Keep the mean in an attribute, which only the evaluation reads."""
    if not model.training:
        return hidden - model.function_mean
    model.function_mean = hidden.detach().mean(0)
    return hidden


def recurrent(model, hidden):
    """Add what the last batch has left."""
    before = getattr(model, "kept", None)
    model.kept = hidden.detach().mean(0) if model.training else before
    return hidden if before is None else hidden + before


def with_buffer():
    model = network(running_mean)
    model.register_buffer("mean", torch.zeros(6))
    return model


def with_norm_limit():
    def look_up(model, hidden):
        return hidden + model.table((hidden[:, 0] > 0).long())

    return network(look_up, table=nn.Embedding(2, 6, max_norm=0.5))


def normalised():
    def forward(model, inputs):
        model.first.weight.data /= model.first.weight.data.norm()
        return model.last(model.first(inputs).tanh())

    return Built(forward, first=nn.Linear(4, 6), last=nn.Linear(6, 3))


def hooked_later():
    """Return a model with a hook that halves a gradient in the second step of each epoch."""
    model, calls = network(), []

    def halve(parameter):
        calls.append(None)
        if len(calls) % 2 == 0:
            parameter.grad.data.mul_(0.5)

    model.first.bias.register_post_accumulate_grad_hook(halve)
    return model


def moved_elsewhere(model):
    with torch.no_grad():
        model.last.weight.mul_(0.999)


def smoothed(smoothing, model, losses, index):
    return functional.cross_entropy(
        model(INPUTS[:SAMPLES][index]), LABELS[index], label_smoothing=smoothing
    )


OUTSIDE = nn.Parameter(torch.tensor([0.5], dtype=torch.float64))
FAST = {"groups": lambda model: [{"params": [model.scale], "lr": 1e4}, *rest(model)]}


def rest(model):
    return [{"params": [*model.first.parameters(), *model.last.parameters()]}]


def with_fast_parameter():
    """Return a model with a parameter whose change hides that of all others."""
    return network(scale=nn.Parameter(torch.zeros(1)))


def fast_losses(model, index):
    logits = model(INPUTS[:SAMPLES][index])
    losses = functional.cross_entropy(logits, LABELS[index], reduction="none")
    return losses + model.scale * torch.as_tensor(index + 1.0)


def fast_reduce(model, losses, index):
    plain = functional.cross_entropy(
        model(INPUTS[:SAMPLES][index]), LABELS[index], label_smoothing=0.1
    )
    return plain + (model.scale * (index + 1.0)).mean()


REFUSED = {
    "weights that are detached": (
        "by detach",
        partial(Pattern, **cut(lambda logits: logits.detach().square().mean(1))),
    ),
    "weights without a gradient": (
        "by square under torch.no_grad",
        partial(Pattern, **cut(without_gradient)),
    ),
    "a weight that is a number": (
        "by item",
        partial(Pattern, **cut(lambda logits: logits.square().mean().item())),
    ),
    "weights of a list": (
        "by tolist",
        partial(Pattern, **cut(lambda logits: torch.tensor(logits.tolist()).sum(1))),
    ),
    "a straight-through estimator of PyTorch": (
        "by gumbel_softmax",
        partial(Pattern, lambda: network(hard)),
    ),
    "weights that the model normalises": ("by data", partial(Pattern, normalised)),
    "a limit of an embedding's norm": (
        "change in the forward pass",
        partial(Pattern, with_norm_limit),
    ),
    "a running mean": ("change of mean", partial(Pattern, with_buffer)),
    "a running mean in an attribute": (
        "function of the model's parameters",
        partial(Pattern, lambda: network(kept_mean)),
    ),
    "a state from batch to batch": (
        "gradients of the recorded step",
        partial(Pattern, lambda: network(recurrent)),
    ),
    "a hook in later steps": (
        "a gradient that is the sum of the samples' gradients",
        partial(Pattern, hooked_later),
    ),
    "a loss that differs a little": (
        "epoch 1, step 0, parameter first.weight",
        partial(Pattern, reduce=partial(smoothed, 1e-4)),
    ),
    "a loss that differs beside a parameter that moves far": (
        "parameter first.weight",
        partial(Pattern, with_fast_parameter, losses=fast_losses, reduce=fast_reduce, **FAST),
    ),
    "a parameter that is changed between steps": (
        "epoch 1, step 1, parameter",
        partial(Pattern, after_step=moved_elsewhere),
    ),
    "a parameter that is changed and not optimized": (
        "change of last.weight between",
        partial(Pattern, groups=lambda m: m.first.parameters(), after_step=moved_elsewhere),
    ),
    "a parameter outside of the model": (
        "not the model's",
        partial(Pattern, groups=lambda model: [*model.parameters(), OUTSIDE]),
    ),
    "parameters that are frozen when the pass begins": (
        "was frozen since",
        partial(Pattern, before_pass=lambda model: model.requires_grad_(False)),
    ),
    "fewer samples than were used": ("sample 7", partial(Pattern, sample_count=5)),
    "a target with a detached factor": (
        "target test",
        partial(Pattern, target=lambda model: (model(INPUTS) * model(INPUTS).detach()).sum()),
    ),
    "a target of a copy": (
        "as those of a copy",
        partial(Pattern, target=lambda model: deepcopy(model)(INPUTS).sum()),
    ),
    "a target with random numbers": (
        "function of the model's parameters",
        partial(Pattern, target=lambda model: (model(INPUTS) * torch.rand(3)).sum()),
    ),
}
"""By case: a part of the message, and the loop."""


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_exact_derivative_is_refused(name):
    torch.manual_seed(0)
    message, make_pattern = REFUSED[name]
    with pytest.raises(UserError, match=message):
        make_pattern().reverse()


MISTAKES = {
    "the form": lambda starts: {key: state["model"] for key, state in starts.items()},
    "none under 0, 1, 2": lambda starts: {},
    "in one of the two only": lambda starts: {
        key: {**state, "model": nn.Linear(2, 2).state_dict()} for key, state in starts.items()
    },
    "of this model and optimizer": lambda starts: {
        key: {**state, "optimizer": SGD(nn.Linear(2, 2).parameters()).state_dict()}
        for key, state in starts.items()
    },
}


@pytest.mark.parametrize("name", MISTAKES)
def test_states_of_something_else_are_named(name):
    pattern = Pattern()
    steps, starts = pattern.train()
    wrong = MISTAKES[name](starts)

    def begin():
        run = RecordedLoop(pattern.model, pattern.optimizer, steps, pattern.losses, wrong)
        ReversePass(run, {"test": pattern.target})

    with pytest.raises(UserError, match=name):
        begin()


@pytest.mark.parametrize("targets", [{}, [], "mean", [lambda model: 0.0], lambda model: 0.0])
def test_targets_without_a_name_are_refused(targets):
    pattern = Pattern()
    steps, starts = pattern.train()
    run = RecordedLoop(pattern.model, pattern.optimizer, steps, pattern.losses, starts)
    with pytest.raises(UserError, match="functions by name"):
        ReversePass(run, targets)


@pytest.mark.parametrize("losses", [0.3, torch.zeros(4), torch.zeros(4, 1), torch.zeros(())])
def test_losses_that_are_not_those_of_samples_are_refused(losses):
    pattern = Pattern()
    steps, starts = pattern.train()
    run = RecordedLoop(pattern.model, pattern.optimizer, steps, lambda *_: losses, starts)
    with pytest.raises(UserError, match="losses of 4 samples"):
        ReversePass(run, {"test": pattern.target}).to_dataset()


@pytest.mark.parametrize("dtype", [torch.bfloat16, "autocast"])
def test_half_precision_is_refused(dtype):
    stored = torch.float32 if dtype == "autocast" else dtype
    inputs = INPUTS.to(stored)

    def logits(model, index):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
            return model(inputs[index]).double()

    def losses(model, index):
        return functional.cross_entropy(logits(model, index), LABELS[index], reduction="none")

    def target(model):
        return functional.cross_entropy(logits(model, slice(SAMPLES, None)), TEST_LABELS)

    pattern = Pattern(lambda: network().to(stored), losses=losses, target=target)
    with pytest.raises(UserError, match="half precision"):
        pattern.reverse()


def test_a_pass_that_is_at_its_end_is_named():
    pattern = Pattern()
    steps, starts = pattern.train()
    run = RecordedLoop(pattern.model, pattern.optimizer, steps, pattern.losses, starts)
    reverse = ReversePass(run, {"test": pattern.target})
    reverse.to_dataset()
    with pytest.raises(UserError, match="at its end"):
        reverse.to_dataset()
