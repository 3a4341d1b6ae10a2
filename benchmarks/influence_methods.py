"""All methods on one run: their scores on the same removals, subsets and test samples.

    unrolled                 the reverse pass; with smoothed gates; its last epoch alone
    -GGN^-1 g, -Hessian^-1 g  eq. 4 of the paper, by one Krylov space for all dampings
    TracIn                   sum over steps of eta <dT/dtheta, g_i>, at the step that used sample i
    dot product              <dT/dtheta, g_i> at the final parameters
    other packages           `influence_others`

Dampings and widths are chosen for each score by the same score over other removals or subsets.

Map: `methods` (the section), `fixed_point_job`, `gradients_job`.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from influence_jobs import (
    RATES,
    Removals,
    Setting,
    StoredRun,
    load_run,
    named_targets,
    write_arrays,
)
from influence_others import other_methods
from influence_scores import WIDTHS, Sizes
from influence_table import EXACT, Bench, Effects, NotStoredError, Row, markdown, number

from sampimp.analysis.prediction import ceiling, predicted_effects, tsloo
from sampimp.influence.fixed_point import fixed_point_influence
from sampimp.influence.linear_stack import Curvature, LinearStackStep
from sampimp.influence.replay import Smoothing

FACTORS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
"""Dampings, in units of the default 1 / (learning rate * steps)."""

OTHERS_FACTORS = (0.1, 1.0, 10.0)
"""Those that other packages are given: each damping is a computation of its own there."""

SELECTION_SUBSETS = 16
"""Subsets of each size that dampings and widths are chosen on."""


def natural_damping(setting: Setting) -> float:
    """Return 1 / (learning rate * number of steps)."""
    return 1 / (RATES[setting.optimizer] * setting.epochs * -(-setting.samples // 100))


def whole_set(run: StoredRun) -> tuple[torch.nn.Module, LinearStackStep]:
    """Return the final model, and the derivatives of its mean training loss."""
    trial = run.replay()
    trial.load_start(run.setting.epochs + 1)
    stack = trial.derivatives(np.arange(trial.sample_count), EXACT)
    assert isinstance(stack, LinearStackStep)
    return trial.model, stack


def fixed_point_job(
    path: Path, scratch: Path, setting: Setting, specs: tuple[str, ...], curvature: Curvature
) -> None:
    """Write eq. 4's influence for all dampings, (damping, target, N)."""
    torch.set_num_threads(1)
    run = load_run(scratch, setting)
    model, stack = whole_set(run)
    targets = named_targets(run, specs)
    start = time.process_time()
    dampings = [factor * natural_damping(setting) for factor in FACTORS]
    values = [
        fixed_point_influence(
            lambda: [stack],
            target.gradient(model),
            dampings,
            curvature=curvature,
            weight_decay=setting.config.training.weight_decay,
        )
        for target in targets
    ]
    write_arrays(path, start, values=np.stack(values, 1))


def gradients_job(path: Path, scratch: Path, setting: Setting, specs: tuple[str, ...]) -> None:
    """Write TracIn from the gradients of each step, and the dot product of the final gradients."""
    torch.set_num_threads(1)
    run = load_run(scratch, setting)
    targets = named_targets(run, specs)
    model, stack = whole_set(run)

    def directions(network: torch.nn.Module) -> list[torch.Tensor]:
        gradients = [target.gradient(network) for target in targets]
        return [torch.stack(parts) for parts in zip(*gradients, strict=True)]

    start = time.process_time()
    dot = -stack.inner(directions(model)).sum(1).numpy()
    trial, tracin = run.replay(), np.zeros((len(targets), len(run.tau)))
    for epoch in range(1, setting.epochs + 1):
        trial.load_start(epoch)
        for step in trial.begin(epoch):
            derivatives = trial.derivatives(step, EXACT)
            assert isinstance(derivatives, LinearStackStep)
            tracin[:, step] -= derivatives.inner(directions(trial.model)).sum(1).numpy()
            trial.train(step)
        trial.check_end(epoch)
    write_arrays(path, start, tracin=tracin * RATES[setting.optimizer], dot=dot)


@dataclass(frozen=True, kw_only=True)
class Truth:
    """Effects of the removals of one score, and of those that settings are chosen on."""

    judged: Effects
    others: Effects


Scores = dict[str, tuple[float, float, float]]


def scores_of(
    candidates: Mapping[str, np.ndarray], truths: Mapping[str, Truth], sizes: Sizes
) -> Scores:
    """Return each score of the candidate (target, N) that does best on the other removals."""
    scores = {}
    for name, truth in truths.items():
        best = max(candidates, key=partial(_selection_score, candidates, truth, sizes.targets))
        predicted = predicted_effects(candidates[best], truth.judged.removed)
        scores[name] = sizes.interval(tsloo, predicted, truth.judged.nll[:, : sizes.targets, 0])
    return scores


def _selection_score(
    candidates: Mapping[str, np.ndarray], truth: Truth, targets: int, name: str
) -> float:
    predicted = predicted_effects(candidates[name], truth.others.removed)
    return float(np.nan_to_num(tsloo(predicted, truth.others.nll[:, :targets, 0]), nan=-1.0))


def truths_of(bench: Bench, sizes: Sizes, setting: Setting) -> dict[str, Truth]:
    """Return the effects of all removals and subsets, by the name of their score."""
    subsets = {
        share: [
            Removals(kind="subset", count=count, share=share, part=part)
            for part, count in enumerate(
                (sizes.method_subsets, min(SELECTION_SUBSETS, sizes.method_subsets))
            )
        ]
        for share in sizes.shares
    }
    plans = [(kind, 2) for kind in sizes.single().values()]
    plans += [(kind, 1) for kind in sizes.single(part=1).values()]
    plans += [(kinds[part], 2 - part) for kinds in subsets.values() for part in (0, 1)]
    bench.retrain([(setting, kind, repeats) for kind, repeats in plans])
    truths = {
        f"TSLOO, {name}": Truth(
            judged=bench.effects(setting, kind, 2),
            others=bench.effects(setting, sizes.single(part=1)[name], 1),
        )
        for name, kind in sizes.single().items()
    }
    for share, (judged, others) in subsets.items():
        truths[f"LDS {share:g}"] = Truth(
            judged=bench.effects(setting, judged, 2), others=bench.effects(setting, others, 1)
        )
    return truths


def methods_of(bench: Bench, sizes: Sizes, setting: Setting) -> dict[str, dict[str, np.ndarray]]:
    """Return the candidates (target, N) of each method, by their setting."""
    folder, specs = bench.scratch / setting.key, sizes.specs
    curvatures: dict[str, Curvature] = {"GGN": "gauss-newton", "Hessian": "hessian"}
    paths = {name: folder / f"fixed-point-{name}.npz" for name in curvatures}
    widths = [Smoothing(gate_width=w) for w in WIDTHS] if setting.activation == "relu" else []
    bench.reverse([(setting, specs, smoothing) for smoothing in (EXACT, *widths)])
    bench.run_jobs(
        [
            (fixed_point_job, paths[name], (setting, specs, curvature))
            for name, curvature in curvatures.items()
        ]
        + [(gradients_job, folder / "gradients.npz", (setting, specs))]
    )
    exact = bench.influence(setting, specs)
    result = {"unrolled": {"": exact["total"]}}
    if widths:
        result["unrolled, smoothed gates"] = {
            f"{s.gate_width:g}": bench.influence(setting, specs, s)["total"] for s in widths
        }
    result["last epoch alone"] = {"": exact["last"]}
    for name, path in paths.items():
        values = bench.read(path)["values"]
        result[f"-{name}^-1 g, best damping"] = {
            f"{factor:g}": value for factor, value in zip(FACTORS, values, strict=True)
        }
        result[f"-{name}^-1 g, damping 1/(eta T)"] = {"": values[FACTORS.index(1.0)]}
    gradients = bench.read(folder / "gradients.npz")
    result["TracIn from in-step gradients"] = {"": gradients["tracin"]}
    result["dot product of final gradients"] = {"": gradients["dot"]}
    return result


def methods(bench: Bench, sizes: Sizes) -> tuple[list[Row], str]:
    """All methods on one run with GELU, and on one with ReLU."""
    rows: list[Row] = []
    texts: list[str] = []
    for activation in ("gelu", "relu"):
        setting = replace(sizes.methods, activation=activation)
        try:
            truths = truths_of(bench, sizes, setting)
            candidates = methods_of(bench, sizes, setting)
        except NotStoredError:
            texts.append(f"{setting.words}: not measured.")
            continue
        dampings = {f"{f:g}": f * natural_damping(setting) for f in OTHERS_FACTORS}
        others, missing = other_methods(bench, sizes, setting, dampings)
        scores = {
            name: scores_of(values, truths, sizes) for name, values in (candidates | others).items()
        }
        texts += [method_table(setting, truths, scores, sizes), *missing]
        rows += [
            difference_row(setting, name, truth, candidates, sizes)
            for name, truth in truths.items()
            if activation == "gelu" and name.startswith("TSLOO")
        ]
    return rows, "\n\n".join(texts)


def difference_row(
    setting: Setting,
    name: str,
    truth: Truth,
    candidates: Mapping[str, Mapping[str, np.ndarray]],
    sizes: Sizes,
) -> Row:
    """Return the row of the unrolled score minus that of the better -H^-1 g."""
    predicted = [predicted_effects(candidates["unrolled"][""], truth.judged.removed)]
    chosen = {
        label: value
        for method, values in candidates.items()
        if method.endswith("best damping")
        for label, value in ((f"{method} {factor}", v) for factor, v in values.items())
    }
    best = max(chosen, key=partial(_selection_score, chosen, truth, sizes.targets))
    predicted.append(predicted_effects(chosen[best], truth.judged.removed))
    actual = truth.judged.nll[:, : sizes.targets, 0]
    value, low, high = sizes.interval(lead, *predicted, actual)
    return Row(
        check="unrolled minus best -H^-1 g",
        setting=f"{setting.words}; {name}",
        value=value,
        low=low,
        high=high,
        asked=0.5,
        note=f"{best} times 1/(eta T) was best on other removals",
    )


def lead(first: np.ndarray, second: np.ndarray, actual: np.ndarray) -> float:
    """Return the score of one prediction minus that of another."""
    return tsloo(first, actual) - tsloo(second, actual)


def score_cell(score: tuple[float, float, float]) -> str:
    """Return a score with its interval; NaN where a method's values are NaN."""
    if np.isnan(score[0]):
        return "NaN"
    return f"{number(score[0])} ({score[1]:.2f} to {score[2]:.2f})"


def method_table(
    setting: Setting, truths: Mapping[str, Truth], scores: Mapping[str, Scores], sizes: Sizes
) -> str:
    """Return the table of all methods' scores."""
    table = [[name, *map(score_cell, scored.values())] for name, scored in scores.items()]
    ceilings = [
        sizes.interval(ceiling, truth.judged.nll[:, : sizes.targets]) for truth in truths.values()
    ]
    table.append(["*one retraining (ceiling)*", *map(score_cell, ceilings)])
    return f"**{setting.words}**, {sizes.targets} test samples:\n\n" + markdown(
        ["method", *truths], table
    )
