"""Importance against retrainings: mean |influence|, tau and `final_importance`.

Each is a size, so that it is compared with the size of an effect: the mean over test samples of the
absolute change of their NLL, or the squared norm of the change of a layer's parameters.

Map: `absolute`, `lasting` (sections of `influence.py`).
"""

from functools import partial

import numpy as np
from influence_jobs import Setting
from influence_scores import Sizes, each_setting, score_row
from influence_table import EXACT, Bench, Row

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


def lasting(bench: Bench, sizes: Sizes) -> list[Row]:
    """`final_importance` by random probes, against the squared change of the parameters."""
    return each_setting(sizes.gelu_runs, partial(_lasting_rows, bench, sizes))


def _lasting_rows(bench: Bench, sizes: Sizes, setting: Setting) -> list[Row]:
    run = bench.runs([setting])[0]
    model = run.model()
    layers = list(dict.fromkeys(name for name, _ in parameter_layers(model)))
    kinds = sizes.single()
    bench.retrain([(setting, kind, 2) for kind in kinds.values()])
    specs = {layer: (f"probe:{sizes.probes}@{layer}",) for layer in layers}
    bench.reverse([(setting, spec, EXACT) for spec in specs.values()])
    every = [bench.effects(setting, kind, 2) for kind in kinds.values()]
    groups = {"both": every[0].join(every[1])} | dict(zip(kinds, every, strict=True))
    squares = []
    rows = []
    for place, layer in enumerate(layers):
        bench.seconds = 0.0
        squares.append(np.square(bench.influence(setting, specs[layer])["total"]).mean(0))
        for name, effects in groups.items():
            rows.append(
                score_row(
                    sizes,
                    f"final_importance of {layer}, {sizes.probes} probes",
                    effects.removed.astype(float) @ squares[-1][:, None],
                    effects.change[:, place : place + 1],
                    asked=0.96 if name == "both" else np.nan,
                    setting=f"{setting.words}; {name}",
                    seconds=bench.seconds,
                )
            )
    for name, effects in groups.items():
        actual = effects.change.sum(1, keepdims=True)
        for word, values_N in (("final_importance", sum(squares)), ("tau", run.tau)):
            predicted = effects.removed.astype(float) @ np.asarray(values_N, float)[:, None]
            where = f"{setting.words}; {name}"
            rows.append(score_row(sizes, f"{word}, all layers", predicted, actual, setting=where))
    return rows
