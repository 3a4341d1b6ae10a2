"""Importance against retrainings: mean |influence|, tau and `final_importance`.

Each is a size, so that it is compared with the size of an effect: the mean over test samples of the
absolute change of their NLL, or the squared norm of the change of a layer's parameters.

Map: `absolute`, `lasting` (sections of `influence.py`), `tangent_job`.
"""

import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from influence_jobs import Setting, layer_squares, load_run, write_arrays
from influence_scores import Sizes, each_setting, score_row
from influence_table import EXACT, Bench, Row

from sampimp.influence.recursion import final_tangents
from sampimp.training.models import parameter_layers


def absolute(bench: Bench, sizes: Sizes) -> list[Row]:
    """Mean |influence| against mean |effect|, over removals; and tau against mean |effect|."""
    settings = [*sizes.gelu_runs, sizes.methods, sizes.relu]
    return each_setting(settings, partial(_absolute_rows, bench, sizes))


def _absolute_rows(bench: Bench, sizes: Sizes, setting: Setting) -> list[Row]:
    specs = (f"sample:0..{sizes.many_targets - 1}",)
    kinds = sizes.single()
    bench.retrain([(setting, kind, 2) for kind in kinds.values()])
    bench.reverse([(setting, specs, EXACT)])
    rows = []
    bench.seconds = 0.0
    every = [bench.effects(setting, kind, 2) for kind in kinds.values()]
    groups = {"both": every[0].join(every[1])} | dict(zip(kinds, every, strict=True))
    tau_N, nll_N = bench.runs([setting])[0].tau, bench.runs([setting])[0].nll
    for name, effects in groups.items():
        row = partial(score_row, sizes, setting=f"{setting.words}; {name}")
        size_K = np.abs(effects.nll).mean(1, keepdims=True)
        few_K = np.abs(effects.nll[:, : sizes.many_targets]).mean(1, keepdims=True)
        total = np.abs(bench.influence(setting, specs)["total"])
        is_asked = setting.activation != "relu" and name == "both"
        rows.append(
            row(
                f"mean abs influence against mean abs effect, {sizes.many_targets} targets",
                effects.removed.astype(float) @ total.mean(0)[:, None],
                few_K,
                asked=0.99 if is_asked else np.nan,
                seconds=bench.seconds,
            )
        )
        for word, values_N in (("tau", tau_N), ("final NLL", nll_N)):
            predicted = effects.removed.astype(float) @ values_N[:, None].astype(np.float64)
            check = f"{word} against mean abs effect, {effects.nll.shape[1]:,} targets"
            rows.append(row(check, predicted, size_K))
    return rows


def tangent_job(path: Path, scratch: Path, setting: Setting, samples: tuple[int, ...]) -> None:
    """Write |d theta_T / d v_i|^2 of each layer for some samples, (sample, layer): eq. 5."""
    torch.set_num_threads(1)
    run = load_run(scratch, setting)
    start = time.process_time()
    trial = run.replay()
    tangents = torch.cat([part.flatten(1) for part in final_tangents(trial, samples)], 1)
    squares = [layer_squares(trial.model, tangent.numpy()) for tangent in tangents]
    write_arrays(path, start, squares=squares)


def lasting(bench: Bench, sizes: Sizes) -> list[Row]:
    """`final_importance` by random probes, against the squared change of the parameters."""
    return each_setting(sizes.gelu_runs, partial(_lasting_rows, bench, sizes))


def _lasting_rows(bench: Bench, sizes: Sizes, setting: Setting) -> list[Row]:
    run = bench.runs([setting])[0]
    layers = list(dict.fromkeys(name for name, _ in parameter_layers(run.model())))
    kinds = sizes.single()
    bench.retrain([(setting, kind, 2) for kind in kinds.values()])
    specs = {layer: (f"probe:{sizes.probes}@{layer}",) for layer in layers}
    bench.reverse([(setting, spec, EXACT) for spec in specs.values()])
    every = [bench.effects(setting, kind, 2) for kind in kinds.values()]
    groups = {"both": every[0].join(every[1])} | dict(zip(kinds, every, strict=True))
    removed = groups["both"].removed.argmax(1)
    path = bench.scratch / setting.key / "tangents.npz"
    bench.run_jobs([(tangent_job, path, (setting, tuple(removed.tolist())))])
    exact_RL = bench.read(path)["squares"]
    squares = []
    rows = []
    for place, layer in enumerate(layers):
        bench.seconds = 0.0
        squares.append(np.square(bench.influence(setting, specs[layer])["total"]).mean(0))
        for name, effects in groups.items():
            row = partial(score_row, sizes, setting=f"{setting.words}; {name}")
            change = effects.change[:, place : place + 1]
            rows.append(
                row(
                    f"final_importance of {layer}, {sizes.probes} probes",
                    effects.removed.astype(float) @ squares[-1][:, None],
                    change,
                    asked=0.96 if name == "both" else np.nan,
                    seconds=bench.seconds,
                )
            )
            if name == "both":
                exact = exact_RL[:, place : place + 1]
                rows.append(row(f"the same of {layer} by the recursion, exact", exact, change))
    for name, effects in groups.items():
        actual = effects.change.sum(1, keepdims=True)
        for word, values_N in (("final_importance", sum(squares)), ("tau", run.tau)):
            predicted = effects.removed.astype(float) @ np.asarray(values_N, float)[:, None]
            where = f"{setting.words}; {name}"
            rows.append(score_row(sizes, f"{word}, all layers", predicted, actual, setting=where))
    return rows
