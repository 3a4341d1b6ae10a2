"""Batches of a training of your own: those of a study, and of a sort in plain Python."""

import math

import numpy as np
import oracles
import pandas as pd
import pytest
import torch
import xarray as xr
from torch.utils.data import DataLoader, TensorDataset

import sampimp
from sampimp.data import load_source
from sampimp.errors import ConfigError, DataError
from sampimp.schema import SORTED_STRATEGIES, STRATEGIES
from sampimp.training.batch_sampler import StrategyBatchSampler

GRID = {"shuffle": (1,), **dict.fromkeys(STRATEGIES, (1,))}
SCORES = np.random.default_rng(0).permutation(23) / 7  # all different


@pytest.fixture(scope="module")
def cube(tmp_path_factory):
    """A study of every strategy on the digits, made without Ray."""
    sources = {"digits": load_source("digits")}
    plan = oracles.make_plan(sources, GRID, hidden=(6,), batch_size=70, epochs=2)
    folder = oracles.start_study(tmp_path_factory.mktemp("strategies"), plan, sources)
    oracles.run_trials(folder, plan, sources)
    return sampimp.open_cube(folder)["digits"].to_dataset()


@pytest.mark.parametrize("strategy", GRID)
def test_the_batches_are_those_of_a_study(cube, strategy):
    """Batch of every sample in every epoch, by scores taken from the cube."""
    run = cube.sel(strategy="shuffle", seed=1)
    by_nll = strategy in ("nlo", "rnlo", "nlm")
    score = (
        run.nll.isel(epoch=-1) if by_nll else run.importance.astype(float).sum(("layer", "epoch"))
    )
    sampler = StrategyBatchSampler(strategy, score, 70, sample_count=1500, seed=0)
    for epoch in (1, 2):
        got = np.full(1500, -1)
        for number, batch in enumerate(sampler):
            got[batch] = number
        expected = cube.batch.sel(strategy=strategy, seed=1, epoch=epoch)
        np.testing.assert_array_equal(got, expected)


def by_python(strategy, scores, size):
    """Return the batches of a sorted strategy by its description."""
    order = sorted(range(len(scores)), key=lambda sample: scores[sample])
    count = math.ceil(len(order) / size)
    if strategy in ("nlm", "sim"):
        return [order[k::count] for k in range(count)]
    longer = len(order) % count
    batches = []
    for number in range(count):
        take = len(scores) // count + (number < longer)
        batches.append(order[:take])
        order = order[take:]
    return batches[::-1] if strategy in ("rnlo", "rsio") else batches


@pytest.mark.parametrize("strategy", SORTED_STRATEGIES)
@pytest.mark.parametrize(
    "form",
    [
        np.asarray,
        torch.tensor,
        lambda scores: torch.tensor(scores, requires_grad=True),
        list,
        lambda scores: xr.DataArray(scores, dims="sample"),
        lambda scores: xr.DataArray(scores, {"sample": np.arange(23)}, "sample").sortby("sample")[
            ::-1
        ],
        lambda scores: pd.DataFrame({"tau": scores}).sort_values("tau")["tau"],
    ],
    ids=["array", "tensor", "leaf", "list", "DataArray", "reversed", "sorted column"],
)
def test_any_form_of_a_score_gives_the_same_batches(strategy, form):
    sampler = StrategyBatchSampler(strategy, form(SCORES), 5)
    assert list(sampler) == by_python(strategy, SCORES, 5)
    assert len(sampler) == 5


def test_drop_last_leaves_out_random_samples_and_keeps_the_order():
    sampler = StrategyBatchSampler("nlo", SCORES, 5, drop_last=True, seed=3)
    (first, again) = list(sampler), list(sampler)
    left_out = np.random.default_rng([3, 0]).permutation(23)[20:]
    kept = [s for s in sorted(range(23), key=lambda s: SCORES[s]) if s not in left_out]
    assert np.concatenate(first).tolist() == kept
    assert [len(batch) for batch in first] == [5] * len(sampler) == [5] * 4
    assert again == first
    assert set(left_out) != set(np.argsort(SCORES)[-3:])  # not simply the hardest


def test_drop_last_of_a_shuffle_leaves_out_others_in_each_epoch():
    sampler = StrategyBatchSampler("shuffle", batch_size=5, sample_count=23, drop_last=True)
    used = [frozenset(np.concatenate(list(sampler)).tolist()) for _ in range(4)]
    assert [len(samples) for samples in used] == [20] * 4
    assert len(set(used)) == 4


def test_fewer_samples_than_a_batch():
    assert list(StrategyBatchSampler("sim", [2.0, 1.0], 5)) == [[1, 0]]
    for strategy in ("shuffle", "rand", "sim", "rsio"):
        dropping = StrategyBatchSampler(strategy, [2.0, 1.0], 5, drop_last=True)
        assert (list(dropping), len(dropping)) == ([], 0)


def test_set_epoch_chooses_the_order_and_iterations_count_on():
    def sampler():
        return StrategyBatchSampler("shuffle", batch_size=5, sample_count=23, seed=4)

    whole = sampler()
    epochs = [list(whole) for _ in range(4)]
    assert len({str(batches) for batches in epochs}) == 4
    resumed = sampler()
    resumed.set_epoch(2)
    assert [list(resumed), list(resumed)] == epochs[2:]
    broken_off = sampler()
    next(iter(broken_off))
    assert list(broken_off) == epochs[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_reads_the_batches_in_order(workers):
    data = TensorDataset(torch.arange(23))
    sampler = StrategyBatchSampler("rsio", SCORES, 5, sample_count=len(data))
    loader = DataLoader(data, batch_sampler=sampler, num_workers=workers)
    assert len(loader) == 5
    for _ in range(2):
        assert [batch.tolist() for (batch,) in loader] == by_python("rsio", SCORES, 5)


@pytest.mark.parametrize(
    ("scores", "count", "words"),
    [
        (np.where(SCORES > 3, np.nan, SCORES), None, "NaN"),
        (np.where(SCORES > 3, np.inf, SCORES), None, "infinite"),
        (SCORES, 24, r"24 samples(.|\n)*\(23,\)"),
        (SCORES[None], 23, r"\(1, 23\)"),
        (["easy", "hard"], None, "<U4"),
        (pd.Series(SCORES).sort_values()[:20], 20, "labels"),
        (xr.DataArray(SCORES, {"sample": np.arange(23) + 1}, "sample"), None, "0 to 22"),
    ],
)
def test_a_score_that_orders_nothing_is_refused(scores, count, words):
    with pytest.raises(DataError, match=words):
        StrategyBatchSampler("nlo", scores, 5, sample_count=count)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nol", SCORES, 5), "did you mean nlo"),
        (("nlo", None, 5), "score of each sample"),
        (("shuffle", None, 5), "sample_count"),
        (("nlo", SCORES, 0), "batch size"),
        (("nlo", SCORES, 2.5), "batch size"),
    ],
)
def test_settings_without_a_meaning_are_refused(arguments, words):
    with pytest.raises(ConfigError, match=words):
        StrategyBatchSampler(*arguments)
