"""What the tests of `sampimp` share: oracles that know none of its formulas, and tiny studies.

`benchmarks/gpu.py` uses the oracles too, where there is no Zarr: the studies import it themselves.
"""

import copy
import itertools

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from sampimp.config import TrainingConfig, TrialConfig
from sampimp.data import Source, scale_inputs
from sampimp.training.loop import TrainingRun
from sampimp.training.strategies import SORT_KEY, make_schedule


def weighted_loss(model, inputs, labels, weights, reduction, dropout_seed=0):
    """Return the batch's loss with a weight on every sample's own; the 1/B of a mean stays 1/B."""
    torch.manual_seed(dropout_seed)  # the masks of dropout, if there is any, are those of the step
    losses = functional.cross_entropy(model(inputs), labels, reduction="none")
    total = (weights * losses).sum()
    return total / len(labels) if reduction == "mean" else total


def layers_of(model):
    """Return the parameters of each module that has some."""
    return {
        name or "model": own
        for name, module in model.named_modules()
        if (own := list(module.parameters(recurse=False)))
    }


def rates_of(optimizer):
    """Return the learning rate of each parameter, by identity."""
    return {id(p): float(g["lr"]) for g in optimizer.param_groups for p in g["params"]}


def importance_by_autograd(model, optimizer, inputs, labels, reduction="mean"):
    """Return beta (layer, sample) from each sample's own gradient, one sample at a time."""
    rates = rates_of(optimizer)
    scale = 1 / len(labels) if reduction == "mean" else 1.0
    table = []
    for own in layers_of(model).values():
        trained = [p for p in own if p.requires_grad and id(p) in rates]
        row = []
        for sample in range(len(labels)):
            beta = torch.zeros((), dtype=inputs.dtype)
            if trained:
                one = slice(sample, sample + 1)
                loss = scale * functional.cross_entropy(model(inputs[one]), labels[one])
                for p, gradient in zip(trained, torch.autograd.grad(loss, trained), strict=True):
                    beta = beta + ((rates[id(p)] * gradient) ** 2).sum()
            row.append(beta)
        table.append(torch.stack(row))
    return torch.stack(table)


def importance_by_two_steps(model, optimizer, inputs, labels, reduction="mean", dropout_seed=0):
    """Return beta (layer, sample) from the optimizer's own step with the sample and without it."""

    def layers_after_step(weights):
        twin, twin_optimizer = copy.deepcopy((model, optimizer))  # one call: they stay connected
        twin_optimizer.zero_grad()
        weighted_loss(twin, inputs, labels, weights, reduction, dropout_seed).backward()
        twin_optimizer.step()
        return [
            torch.cat([p.detach().reshape(-1) for p in own]) for own in layers_of(twin).values()
        ]

    every = torch.ones(len(labels), dtype=inputs.dtype)
    with_all = layers_after_step(every)
    columns = []
    for sample in range(len(labels)):
        weights = every.clone()
        weights[sample] = 0
        without = layers_after_step(weights)
        columns.append(
            torch.stack([((a - b) ** 2).sum() for a, b in zip(with_all, without, strict=True)])
        )
    return torch.stack(columns, dim=1)


OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"weight_decay": 0.1}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    "nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "adam": (torch.optim.Adam, {"weight_decay": 0.1, "amsgrad": True, "betas": (0.8, 0.9)}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "rmsprop": (torch.optim.RMSprop, {"weight_decay": 0.1}),
    "rmsprop, centered": (torch.optim.RMSprop, {"centered": True, "momentum": 0.9}),
    "adagrad": (torch.optim.Adagrad, {"lr_decay": 0.1, "weight_decay": 0.1}),
}
"""By name: class and settings, so that every rule of `sampimp.importance.optimizers` is met."""


def moved_optimizer(name, model, gradients):
    """Return an optimizer whose moments are those of two steps, at the parameters as they are."""
    kind, options = OPTIMIZERS[name]
    optimizer = kind(model.parameters(), lr=0.1, **options)
    before = copy.deepcopy(model.state_dict())
    for phase in (0, 2):
        for key, parameter in model.named_parameters():
            if key in gradients:
                own = gradients[key]
                weights = torch.arange(phase, phase + len(own)).to(own).sin() + 0.4
                parameter.grad = torch.tensordot(weights, own, 1)
        optimizer.step()
    model.load_state_dict(before)
    return optimizer


def weighted(gradients, scale):
    """Return the gradients of losses that have a weight."""
    return {k: torch.einsum("n,n...->n...", scale, own) for k, own in gradients.items()}


def layer_of(name):
    """Return the module that owns a parameter, as the recorder names it."""
    return name.rpartition(".")[0] or "model"


def gradients_by_loss(model, losses):
    """Return {parameter's name: gradients (sample, ...)} of the losses (sample,) of one pass."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows = [
        torch.autograd.grad(loss, trained.values(), retain_graph=True, materialize_grads=True)
        for loss in losses
    ]
    return {name: torch.stack([row[k] for row in rows]) for k, name in enumerate(trained)}


def importance_by_update(model, optimizer, gradients):
    """Return {layer: beta (sample,)} of the optimizer's own next step, derived by autograd.

    `gradients` are by name those of each sample's loss, so of the derivatives by the weights v of
    the gradient of sum_i v_i loss_i. The step is carried out on copies, as a function of that.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    copies, groups = {}, []
    for group in optimizer.param_groups:
        own = {names[id(p)]: p.detach().clone().requires_grad_().clone() for p in group["params"]}
        copies |= own
        groups.append({"params": list(own.values())})
    twin = type(optimizer)(groups, differentiable=True)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # with all other settings
    for group in twin.param_groups:
        group["differentiable"] = True
    sums = {name: gradients[name].sum(0).requires_grad_() for name in copies if name in gradients}
    for name, summed in sums.items():
        copies[name].grad = summed
    twin.step()
    # Twice backward is once forward: the product with the transposed derivative is linear in its
    # vector.
    vectors = [torch.ones_like(summed, requires_grad=True) for summed in sums.values()]
    own = [copies[name] for name in sums]
    products = torch.autograd.grad(own, list(sums.values()), vectors, create_graph=True)
    moves = torch.autograd.grad(
        products, vectors, [gradients[name] for name in sums], is_grads_batched=True
    )
    zero = torch.zeros(len(moves[0]), device=moves[0].device)
    betas = {layer_of(name): zero.clone() for name in names.values()}
    for name, move in zip(sums, moves, strict=True):
        # Where all second moments are 0, so are the gradients, and the root has no derivative.
        known = move.where(gradients[name] != 0, 0)
        betas[layer_of(name)] += known.square().reshape(len(move), -1).sum(1)
    return betas


def make_source(samples=24, tests=9, classes=3, shape=(1, 2, 2), seed=0, name="made"):
    """Return a small data set of 8-bit images in which every class occurs."""
    rng = np.random.default_rng(seed)

    def part(count):
        values = rng.integers(0, 256, (count, *shape)).astype(np.uint8)
        return values, rng.permutation(np.arange(count, dtype=np.int64) % classes)

    (train_values, train_labels), (test_values, test_labels) = part(samples), part(tests)
    return Source(
        name=name,
        train_values=train_values,
        train_labels=train_labels,
        test_values=test_values,
        test_labels=test_labels,
        full_scale=255.0,
        class_names=tuple(f"class {number}" for number in range(classes)),
    )


def make_plan(sources, grid, **changes):
    """Return a plan over small data sets, with a small network."""
    from sampimp.schema import digest_json
    from sampimp.store.plan import DatasetInfo, Plan
    from sampimp.store.record import chunk_table

    settings = {"hidden": (5, 4), "epochs": 3, "batch_size": 5, "learning_rate": 0.3}
    training = TrainingConfig(**(settings | changes))

    def layers_of_source(source):
        sizes = (int(np.prod(source.train_values.shape[1:])), *training.hidden)
        sizes = (*sizes, len(source.class_names))
        names = [*(f"L{n}" for n in range(1, len(training.hidden) + 1)), "Out"]
        return tuple(
            (name, size)
            for name, a, b in zip(names, sizes[:-1], sizes[1:], strict=True)
            for size in (a * b, b)
        )

    return Plan(
        datasets={
            key: DatasetInfo(
                name=source.name,
                digest=source.digest,
                sample_count=len(source.train_labels),
                test_count=len(source.test_labels),
                input_shape=source.train_values.shape[1:],
                class_names=source.class_names,
                layers=layers_of_source(source),
                chunks=digest_json(chunk_table(source)),
            )
            for key, source in sources.items()
        },
        training=training,
        grid=grid,
    )


def trial_config(strategy="shuffle", seed=1, order_seed=0, **changes):
    """Return a trial of a small network."""
    settings = {"hidden": (6, 5), "epochs": 4, "batch_size": 7, "learning_rate": 0.3}
    training = TrainingConfig(**(settings | changes))
    return TrialConfig(
        dataset="made", strategy=strategy, seed=seed, order_seed=order_seed, training=training
    )


def identity_of(planned):
    """Return what a record says of itself."""
    config = planned.config
    return {
        "dataset": config.dataset,
        "strategy": config.strategy,
        "seed": config.seed,
        "fingerprint": planned.fingerprint,
    }


def start_study(out, plan, sources):
    """Write the plan and its data sets, and no trial."""
    from sampimp.store.location import Folder
    from sampimp.store.record import write_source

    folder = Folder.of(out)
    folder.write_json("study.json", plan.to_json())
    for key, source in sources.items():
        write_source(folder / "datasets" / f"{key}.zarr", source)
    return folder


def run_trials(folder, plan, sources, *, commit=lambda trial: True):
    """Train what is planned, references first; return the epoch records of each trial by label.

    A trial for which `commit` is false is trained and written, and not committed.
    """
    from sampimp.store.plan import read_commits
    from sampimp.store.record import TrialRecord, read_difficulty

    done = {}
    for _ in range(2):  # the references, then those that sort by them
        for planned in plan.resolve(read_commits(folder)):
            config, key = planned.config, planned.config.dataset
            if planned.trial_id is None or planned.label in done:
                continue
            difficulty = None
            if planned.reference_id:
                reference = folder / "trials" / planned.reference_id
                kind = SORT_KEY[config.strategy]
                difficulty = read_difficulty(reference, kind, plan.layout(key))
            data = scale_inputs(sources[key], plan.training.input_scaling)
            schedule = make_schedule(
                config.strategy,
                len(data.train_labels),
                plan.training.batch_size,
                config.order_seed,
                difficulty,
            )
            record = TrialRecord(
                folder / "trials" / planned.trial_id,
                identity_of(planned),
                plan.layout(key),
            )
            records = list(TrainingRun(config, data, schedule).records())
            for epoch_record in records:
                record.write(epoch_record)
            if commit(planned):
                record.commit(records[-1].epoch if records[-1].diverged else None)
            done[planned.label] = records
    return done


def close(got, want, relative=1e-10, scale=None):
    """Whether two tensors agree to a fraction of each value, or of `scale` where that is given."""
    assert got.shape == want.shape
    tolerance = relative * (want.abs() if scale is None else want.abs() + scale)
    return bool(((got - want).abs() <= tolerance).all())


def tiny_mlp(sizes=(4, 5, 3), activation=nn.ReLU, dtype=torch.float64, seed=0):
    """Return a small network with linear layers named by their position."""
    torch.manual_seed(seed)
    modules = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        modules += [nn.Linear(fan_in, fan_out), activation()]
    return nn.Sequential(*modules[:-1]).to(dtype)
