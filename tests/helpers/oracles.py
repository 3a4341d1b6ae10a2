"""Shared by tests: oracles of importance without the package's formulas, and tiny studies.

`benchmarks/gpu.py` uses the oracles without Zarr, so functions of studies import the store inside.
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
    """Return the batch's loss with a weight per sample; a mean still divides by B."""
    torch.manual_seed(dropout_seed)  # the dropout masks of the recorded step
    losses = functional.cross_entropy(model(inputs), labels, reduction="none")
    total = (weights * losses).sum()
    return total / len(labels) if reduction == "mean" else total


def layers_of(model):
    """Return the parameters of each module that has parameters of its own."""
    return {
        name or "model": parameters
        for name, module in model.named_modules()
        if (parameters := list(module.parameters(recurse=False)))
    }


def rates_of(optimizer):
    """Return the learning rate of each parameter, by `id`."""
    return {id(p): float(g["lr"]) for g in optimizer.param_groups for p in g["params"]}


def importance_by_autograd(model, optimizer, inputs, labels, reduction="mean"):
    """Return beta (layer, sample) from per-sample gradients, one sample at a time."""
    rates = rates_of(optimizer)
    scale = 1 / len(labels) if reduction == "mean" else 1.0
    table = []
    for parameters in layers_of(model).values():
        trained = [p for p in parameters if p.requires_grad and id(p) in rates]
        row = []
        for sample in range(len(labels)):
            beta = torch.zeros((), dtype=inputs.dtype)
            if trained:
                row_of_sample = slice(sample, sample + 1)
                logits = model(inputs[row_of_sample])
                loss = scale * functional.cross_entropy(logits, labels[row_of_sample])
                for p, gradient in zip(trained, torch.autograd.grad(loss, trained), strict=True):
                    beta = beta + ((rates[id(p)] * gradient) ** 2).sum()
            row.append(beta)
        table.append(torch.stack(row))
    return torch.stack(table)


def importance_by_two_steps(model, optimizer, inputs, labels, reduction="mean", dropout_seed=0):
    """Return beta (layer, sample) from the optimizer's step with and without the sample."""

    def layers_after_step(weights):
        twin, twin_optimizer = copy.deepcopy((model, optimizer))  # one call keeps them connected
        twin_optimizer.zero_grad()
        weighted_loss(twin, inputs, labels, weights, reduction, dropout_seed).backward()
        twin_optimizer.step()
        return [
            torch.cat([p.detach().reshape(-1) for p in parameters])
            for parameters in layers_of(twin).values()
        ]

    ones = torch.ones(len(labels), dtype=inputs.dtype)
    with_all = layers_after_step(ones)
    columns = []
    for sample in range(len(labels)):
        weights = ones.clone()
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
"""Class and settings by name; together they use every rule of `sampimp.importance.optimizers`."""


def moved_optimizer(name, model, gradients):
    """Return an optimizer with the moments of two steps, at the model's unchanged parameters."""
    kind, options = OPTIMIZERS[name]
    optimizer = kind(model.parameters(), lr=0.1, **options)
    before = copy.deepcopy(model.state_dict())
    for phase in (0, 2):
        for key, parameter in model.named_parameters():
            if key in gradients:
                rows = gradients[key]
                weights = torch.arange(phase, phase + len(rows)).to(rows).sin() + 0.4
                parameter.grad = torch.tensordot(weights, rows, 1)
        optimizer.step()
    model.load_state_dict(before)
    return optimizer


def weighted(gradients, scale):
    """Return per-sample gradients, each multiplied by its sample's weight."""
    return {key: torch.einsum("n,n...->n...", scale, rows) for key, rows in gradients.items()}


def layer_of(name):
    """Return the module of a parameter, as the recorder names it."""
    return name.rpartition(".")[0] or "model"


def gradients_by_loss(model, losses):
    """Return {parameter name: gradients (sample, ...)} of the losses (sample,) of one pass."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows = [
        torch.autograd.grad(loss, trained.values(), retain_graph=True, materialize_grads=True)
        for loss in losses
    ]
    return {name: torch.stack([row[k] for row in rows]) for k, name in enumerate(trained)}


def importance_by_update(model, optimizer, gradients):
    """Return {layer: beta (sample,)} of the optimizer's next step, differentiated by autograd.

    `gradients` maps parameter names to per-sample gradients: the derivatives, by the weights v_i,
    of the gradient of sum_i v_i loss_i. The step is executed on copies of the parameters.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    copies, groups = {}, []
    for group in optimizer.param_groups:
        group_copies = {
            names[id(p)]: p.detach().clone().requires_grad_().clone() for p in group["params"]
        }
        copies |= group_copies
        groups.append({"params": list(group_copies.values())})
    twin = type(optimizer)(groups, differentiable=True)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # with all other settings
    for group in twin.param_groups:
        group["differentiable"] = True
    sums = {name: gradients[name].sum(0).requires_grad_() for name in copies if name in gradients}
    for name, summed in sums.items():
        copies[name].grad = summed
    twin.step()
    # Forward mode by two backward passes: the vector-Jacobian product is linear in its vector, so
    # that its derivative by the vector is the Jacobian-vector product.
    vectors = [torch.ones_like(summed, requires_grad=True) for summed in sums.values()]
    updated = [copies[name] for name in sums]
    products = torch.autograd.grad(updated, list(sums.values()), vectors, create_graph=True)
    moves = torch.autograd.grad(
        products, vectors, [gradients[name] for name in sums], is_grads_batched=True
    )
    zero = torch.zeros(len(moves[0]), device=moves[0].device)
    betas = {layer_of(name): zero.clone() for name in names.values()}
    for name, move in zip(sums, moves, strict=True):
        # A second moment of 0 belongs to a gradient of 0, where the root has no derivative.
        finite = move.where(gradients[name] != 0, 0)
        betas[layer_of(name)] += finite.square().reshape(len(move), -1).sum(1)
    return betas


def make_source(samples=24, tests=9, classes=3, shape=(1, 2, 2), seed=0, name="made"):
    """Return a small data set of files of 8-bit images in which every class occurs."""
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
        train_files=tuple(f"train/classé {label}/{n}.png" for n, label in enumerate(train_labels)),
        test_files=tuple(f"test/classé {label}/{n}.png" for n, label in enumerate(test_labels)),
    )


def make_plan(sources, grid, **changes):
    """Return the plan of a study of small data sets with a small network."""
    from sampimp.schema import digest_json
    from sampimp.store.datasets import chunk_table
    from sampimp.store.plan import DatasetInfo, Plan

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
    """Return the configuration of a trial with a small network."""
    settings = {"hidden": (6, 5), "epochs": 4, "batch_size": 7, "learning_rate": 0.3}
    training = TrainingConfig(**(settings | changes))
    return TrialConfig(
        dataset="made", strategy=strategy, seed=seed, order_seed=order_seed, training=training
    )


def identity_of(planned):
    """Return the attributes that identify a trial in its record."""
    config = planned.config
    return {
        "dataset": config.dataset,
        "strategy": config.strategy,
        "seed": config.seed,
        "fingerprint": planned.fingerprint,
    }


def start_study(out, plan, sources):
    """Write the plan and its data sets, without trials."""
    from sampimp.store.datasets import store_source
    from sampimp.store.location import Folder

    folder = Folder.of(out)
    folder.write_json("study.json", plan.to_json())
    for key, source in sources.items():
        store_source(folder, key, source)
    return folder


def run_trials(folder, plan, sources, *, commit=lambda trial: True):
    """Train the planned trials, references first; return each trial's epoch records by label.

    A trial for which `commit` returns False is trained and written, but not committed.
    """
    from sampimp.store.plan import read_commits
    from sampimp.store.record import TrialRecord
    from sampimp.store.variables import read_difficulty

    done = {}
    for _ in range(2):  # the references, then the strategies that sort by them
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


def close(actual, expected, relative=1e-10, scale=None):
    """Return whether tensors agree within `relative` times each expected value plus `scale`."""
    assert actual.shape == expected.shape
    tolerance = relative * (expected.abs() if scale is None else expected.abs() + scale)
    return bool(((actual - expected).abs() <= tolerance).all())


def tiny_mlp(sizes=(4, 5, 3), activation=nn.ReLU, dtype=torch.float64, seed=0):
    """Return a small network of linear layers, named by their position."""
    torch.manual_seed(seed)
    modules = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        modules += [nn.Linear(fan_in, fan_out), activation()]
    return nn.Sequential(*modules[:-1]).to(dtype)
