"""How good and how dear influence on the final model is: one page of checks, `make influence`.

    exactness    against the recursion, differences and forward mode; replays bit for bit
    removals     TSLOO under SGD, smooth activations, 5 epochs; long: 30 epochs
    adamw        the same under AdamW, smoothed in the pullback; adamw-long: 30 epochs
    finite       why TSLOO is below 1: the size of a removal, and float32
    absolute     mean |influence|, and tau, against mean |effect|
    lasting      final_importance against the change of the parameters
    repeats      one derivative against the mean of 12 retrainings, ReLU
    methods      -H^-1 g, TracIn, other packages: all on one run
    paper        LDS of the paper's network
    cost         time and memory; the only section that needs an idle machine

Everything that is trained is stored below `--scratch`. The same command continues after any stop; a
section that is asked for again is scored again from what is stored. All sections take about three
hours on one core. The other packages (dattri, captum: extra `bench`; pyDVL) are left out where they
are not installed.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # before torch starts its threads
    os.environ.setdefault(_variable, "1")

import influence_importance as importance  # noqa: E402
import influence_scores as scores  # noqa: E402
import torch  # noqa: E402
import tyro  # noqa: E402
from influence_cost import cost  # noqa: E402
from influence_exact import exactness  # noqa: E402
from influence_jobs import Setting  # noqa: E402
from influence_methods import methods  # noqa: E402
from influence_table import Bench, NotStoredError, Page  # noqa: E402
from step import describe_machine, note  # noqa: E402

Section = Callable[[Bench, scores.Sizes], Any]

SECTIONS: dict[str, tuple[str, Section]] = {
    "exactness": ("Exactness", exactness),
    "removals": ("Single removals, SGD, 5 epochs", scores.removals),
    "long": ("Single removals, SGD, 30 epochs", partial(scores.removals, is_long=True)),
    "adamw": ("Single removals, AdamW, 5 epochs", scores.smoothed),
    "adamw-long": (
        "Single removals, AdamW, 30 epochs",
        partial(scores.smoothed, is_long=True),
    ),
    "finite": ("Why TSLOO is below 1", scores.finite),
    "absolute": ("Sizes: mean |influence|, tau", importance.absolute),
    "lasting": ("What is left in the parameters: final_importance", importance.lasting),
    "repeats": ("ReLU: the mean of many retrainings", scores.repeated),
    "methods": ("All methods on one run", methods),
    "paper": ("Groups: LDS of the paper's network", scores.paper_network),
    "cost": ("Cost", cost),
}

HEAD = """# Influence on the final model: checks

Written by `make influence` (`benchmarks/influence.py`). *TSLOO*: over removals of single samples,
Spearman's correlation of predicted with actual change of a test sample's NLL, averaged over test
samples; samples drawn at random and the most important ones (by tau) are apart. *LDS* at a share:
the same over random subsets that keep the share, retrained from the same start in the same order.
*Ceiling*: the same score of one retraining against another whose start is jittered by 1e-3; no
prediction can be expected above it. Effect of a removal = -influence; the mean of a batch's loss
keeps its denominator. Intervals: bootstrap over removals or subsets. Dampings and widths of
smoothing were chosen on other removals than those they are judged by. All runs: initialisation 1,
random batches of 100, weight decay 1e-5; MNIST's first images. CPU s: of the retrainings and
reverse passes behind a row, most of which several rows share."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is measured, and where."""

    scratch: Path = Path("results/influence-benchmark")
    """Folder of everything that is trained; choose another one after a change in the code."""
    sections: tuple[str, ...] = tuple(SECTIONS)
    """Sections to measure; the others keep their stored rows."""
    out: Path = Path(__file__).parent / "influence.md"
    """The page."""
    workers: int = 2
    """Processes, of one thread each; 0 runs all in this process."""
    only_stored: bool = False
    """Train nothing: write the page from what is stored."""
    smoke: bool = False
    """Tiny runs on the digits: a test of the script."""


def smoke_sizes() -> scores.Sizes:
    """Return numbers so small that every section takes a second or two."""
    tiny = Setting(dataset="digits", samples=200, width=8, epochs=2)
    return scores.Sizes(
        removals=6,
        subsets=6,
        method_subsets=6,
        targets=3,
        many_targets=4,
        probes=2,
        retrainings=3,
        epochs=(2, 3),
        smooth_runs=(tiny,),
        wide_runs=(),
        paper=Setting(dataset="digits", samples=200, activation="relu", width=10, epochs=2),
        methods=Setting(dataset="digits", samples=200, width=8, epochs=3),
        exact_samples=1,
        resamples=20,
        rounds=1,
        networks=("gru",),
        network_steps=1,
        memory_samples=None,
    )


def main(config: Config) -> None:
    """Measure the sections, and write the page after each of them."""
    torch.set_num_threads(1)
    sizes = smoke_sizes() if config.smoke else scores.Sizes()
    config.scratch.mkdir(parents=True, exist_ok=True)
    titles = {name: title for name, (title, _) in SECTIONS.items()}
    head = f"{HEAD}\n\n{note(describe_machine())}"
    bench = Bench(config.scratch, config.workers, only_stored=config.only_stored)
    page = Page(config.scratch, config.out, titles, head)
    for name in config.sections:
        start = time.monotonic()
        print(f"{name}: {titles[name]}", flush=True)
        try:
            result = SECTIONS[name][1](bench, sizes)
        except NotStoredError:
            print("  not stored")
            continue
        page.add(name, *(result if isinstance(result, tuple) else (result,)))
        print(f"  {time.monotonic() - start:.0f} s", flush=True)
    bench.close()
    page.write()
    print(config.out)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__.partition("\n")[0]))
