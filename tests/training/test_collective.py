"""Several workers, connected by gloo, train what one does: the same samples, the same numbers."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sampimp.data import Dataset
from sampimp.schema import CURVES
from sampimp.training.collective import ALONE, TorchWorkers, Workers
from sampimp.training.fused import FusedStep
from sampimp.training.loop import TrainingRun
from sampimp.training.models import build_mlp, flatten_parameters
from sampimp.training.strategies import make_schedule

HOST = "127.0.0.1"


def run_together(size, work):
    """Run `work(workers)` as each of so many workers, in threads; return the results by rank."""
    store = TorchWorkers.open(HOST, size)

    def one(rank):
        where = store if rank == 0 else (HOST, store.port)
        return work(TorchWorkers.join(where, HOST, rank, size, "cpu"))

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


def make_data(dtype, samples=40, tests=11, inputs=6, classes=3):
    rng = np.random.default_rng(0)

    def part(count):
        return rng.random((count, inputs)).astype(dtype), rng.permutation(
            np.arange(count) % classes
        )

    return Dataset(*part(samples), *part(tests))


def train(workers, dtype, **changes):
    """Return the records, and the parameters in their own precision after each."""
    config = oracles.trial_config(**changes)
    data = make_data(dtype)
    schedule = make_schedule(
        config.strategy,
        len(data.train_labels),
        config.training.batch_size,
        config.order_seed,
        np.random.default_rng(1).random(len(data.train_labels)),
    )
    run = TrainingRun(config, data, schedule, workers=workers)
    return [(record, flatten_parameters(run.model).clone()) for record in run.records()]


@pytest.fixture(autouse=True)
def threads_are_restored():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@given(count=st.integers(0, 50), size=st.integers(1, 7))
def test_each_item_is_in_one_share_and_shares_are_even(count, size):
    shares = []
    for rank in range(size):
        workers = Workers()
        workers.rank, workers.size = rank, size
        shares.append(list(range(count))[workers.share(count)])
    assert list(itertools.chain(*shares)) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


# 40 samples in batches of 7 (6 batches of 6 or 7), of 3 for 3 workers, of 1 or 2 for two and three.
@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (2, {"strategy": "shuffle", "batch_size": 7}),
        (2, {"strategy": "nlo", "batch_size": 1}),
        (3, {"strategy": "sim", "batch_size": 2}),
        (2, {"strategy": "shuffle", "batch_size": 7, "optimizer": "adamw"}),
    ],
)
def test_the_record_is_that_of_one_worker_in_float64(size, changes):
    expected = train(ALONE, np.float64, **changes)
    each = run_together(size, lambda workers: train(workers, np.float64, **changes))
    assert len(expected) == 5
    for results in each:
        for (record, parameters), (one, alone) in zip(results, expected, strict=True):
            assert parameters.dtype == torch.float64
            torch.testing.assert_close(parameters, alone, rtol=0, atol=1e-13)
            assert record.epoch == one.epoch
            assert set(record.arrays) == set(one.arrays)
            if record.epoch == 0:
                continue
            assert set(CURVES) <= set(record.arrays)
            np.testing.assert_array_equal(record.arrays["batch"], one.arrays["batch"])
            for name in ("importance", "nll"):  # float32, so to its last bit
                np.testing.assert_allclose(
                    record.arrays[name], one.arrays[name], rtol=3e-7, err_msg=name
                )
            for name in ("train_nll", "test_nll"):
                np.testing.assert_allclose(record.arrays[name], one.arrays[name], rtol=1e-12)
            for name in ("train_error", "test_error"):
                assert record.arrays[name] == one.arrays[name]


def test_all_workers_have_the_same_bytes_in_float32():
    changes = {"batch_size": 7, "hidden": (33, 17), "learning_rate": 0.5}
    first, *others = run_together(3, lambda workers: train(workers, np.float32, **changes))
    alone = train(ALONE, np.float32, **changes)
    assert not torch.equal(first[-1][1], alone[-1][1])  # the sums are really made in another order
    for other in others:
        for (record, parameters), (expected, as_first) in zip(other, first, strict=True):
            assert parameters.numpy().tobytes() == as_first.numpy().tobytes()
            for name, values in record.arrays.items():
                assert values.tobytes() == expected.arrays[name].tobytes(), name


def test_a_sum_over_workers_is_the_sum_in_any_type():
    def work(workers):
        tensors = [
            torch.full((2, 3), workers.rank + 1.0, dtype=torch.float64),
            torch.tensor(10 ** (workers.rank + 10)),
            torch.tensor([float("inf"), float("nan"), -0.0]),
        ]
        workers.sum(tensors)
        return tensors

    for doubles, integer, special in run_together(3, work):
        assert doubles.tolist() == [[6.0] * 3] * 2
        assert int(integer) == 111 * 10**10
        assert special.isinf()[0]
        assert special.isnan()[1]


def test_what_is_gathered_is_what_each_had_to_the_bit():
    values = torch.tensor([[0.1, 1e-40, float("nan"), float("inf"), 7.0]])

    def work(workers):
        own = np.array([0, 3]) if workers.rank == 0 else np.array([4, 1, 2])
        return workers.gather(values[:, own], own, 5)

    for gathered in run_together(2, work):
        assert gathered.numpy().tobytes() == values.numpy().tobytes()


def test_a_share_of_no_sample_adds_nothing_and_records_nothing():
    model = build_mlp((4,), (5,), 3, seed=0)
    step = FusedStep(model, torch.optim.SGD(model.parameters(), lr=0.1), record=True)
    before = flatten_parameters(model).clone()
    step(torch.empty(0, 4), torch.empty(0, dtype=torch.int64), 1)
    assert torch.equal(flatten_parameters(model), before)
    assert step.take().shape == (2, 0)


def test_a_run_that_diverges_ends_for_every_worker_in_the_same_epoch():
    each = run_together(2, lambda w: train(w, np.float32, learning_rate=1e18))
    for results in each:
        assert [record.epoch for record, _ in results] == [0, 1]
        assert results[-1][0].diverged
    # Not numbers, but the same bytes, so that the workers are not taken to have come apart.
    assert len({results[-1][1].numpy().tobytes() for results in each}) == 1
