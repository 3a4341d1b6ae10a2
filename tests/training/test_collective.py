"""Workers connected by gloo train on the same samples as one process, with the same numbers."""

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
from sampimp.training.collective import SINGLE_PROCESS, ProcessGroup, TorchProcessGroup
from sampimp.training.fused import FusedStep
from sampimp.training.loop import TrainingRun
from sampimp.training.models import build_mlp, flatten_parameters
from sampimp.training.strategies import make_schedule

HOST = "127.0.0.1"


def run_together(size, work):
    """Run `work(group)` in one thread per worker; return the results by rank."""
    store = TorchProcessGroup.open(HOST, size)

    def run(rank):
        meeting_point = store if rank == 0 else (HOST, store.port)
        return work(TorchProcessGroup.join(meeting_point, HOST, rank, size, "cpu"))

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


def make_data(dtype, samples=40, tests=11, inputs=6, classes=3):
    rng = np.random.default_rng(0)

    def part(count):
        return rng.random((count, inputs)).astype(dtype), rng.permutation(
            np.arange(count) % classes
        )

    return Dataset(*part(samples), *part(tests))


def train(group, dtype, **changes):
    """Return each record with the parameters after it, in the precision `dtype`."""
    config = oracles.trial_config(**changes)
    data = make_data(dtype)
    schedule = make_schedule(
        config.strategy,
        len(data.train_labels),
        config.training.batch_size,
        config.order_seed,
        np.random.default_rng(1).random(len(data.train_labels)),
    )
    run = TrainingRun(config, data, schedule, process_group=group)
    return [(record, flatten_parameters(run.model).clone()) for record in run.records()]


@pytest.fixture(autouse=True)
def threads_are_restored():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@given(count=st.integers(0, 50), size=st.integers(1, 7))
def test_shares_are_even_and_cover_every_item_once(count, size):
    shares = []
    for rank in range(size):
        group = ProcessGroup()
        group.rank, group.size = rank, size
        shares.append(list(range(count))[group.share(count)])
    assert list(itertools.chain(*shares)) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


# 40 samples: 6 batches of 6 or 7, or batches of 1 and 2, which leave some workers an empty share.
@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (2, {"strategy": "shuffle", "batch_size": 7}),
        (2, {"strategy": "nlo", "batch_size": 1}),
        (3, {"strategy": "sim", "batch_size": 2}),
        (2, {"strategy": "shuffle", "batch_size": 7, "optimizer": "adamw"}),
    ],
)
def test_workers_record_what_a_single_process_records_in_float64(size, changes):
    expected = train(SINGLE_PROCESS, np.float64, **changes)
    results_by_rank = run_together(size, lambda group: train(group, np.float64, **changes))
    assert len(expected) == 5
    for results in results_by_rank:
        for (record, parameters), (single, single_parameters) in zip(
            results, expected, strict=True
        ):
            assert parameters.dtype == torch.float64
            torch.testing.assert_close(parameters, single_parameters, rtol=0, atol=1e-13)
            assert record.epoch == single.epoch
            assert set(record.arrays) == set(single.arrays)
            if record.epoch == 0:
                continue
            assert set(CURVES) <= set(record.arrays)
            np.testing.assert_array_equal(record.arrays["batch"], single.arrays["batch"])
            for name in ("importance", "nll"):  # float32: to the last bit
                np.testing.assert_allclose(
                    record.arrays[name], single.arrays[name], rtol=3e-7, err_msg=name
                )
            for name in ("train_nll", "test_nll"):
                np.testing.assert_allclose(record.arrays[name], single.arrays[name], rtol=1e-12)
            for name in ("train_error", "test_error"):
                assert record.arrays[name] == single.arrays[name]


def test_all_workers_have_equal_bytes_in_float32():
    changes = {"batch_size": 7, "hidden": (33, 17), "learning_rate": 0.5}
    first, *others = run_together(3, lambda group: train(group, np.float32, **changes))
    single = train(SINGLE_PROCESS, np.float32, **changes)
    assert not torch.equal(first[-1][1], single[-1][1])  # the order of the sums does differ
    for other in others:
        for (record, parameters), (expected, expected_parameters) in zip(other, first, strict=True):
            assert parameters.numpy().tobytes() == expected_parameters.numpy().tobytes()
            for name, values in record.arrays.items():
                assert values.tobytes() == expected.arrays[name].tobytes(), name


def test_sum_over_workers_in_every_dtype():
    def work(group):
        tensors = [
            torch.full((2, 3), group.rank + 1.0, dtype=torch.float64),
            torch.tensor(10 ** (group.rank + 10)),
            torch.tensor([float("inf"), float("nan"), -0.0]),
        ]
        group.sum(tensors)
        return tensors

    for doubles, integer, special in run_together(3, work):
        assert doubles.tolist() == [[6.0] * 3] * 2
        assert int(integer) == 111 * 10**10
        assert special.isinf()[0]
        assert special.isnan()[1]


def test_gathered_values_are_the_workers_values_bit_for_bit():
    values = torch.tensor([[0.1, 1e-40, float("nan"), float("inf"), 7.0]])

    def work(group):
        positions = np.array([0, 3]) if group.rank == 0 else np.array([4, 1, 2])
        return group.gather(values[:, positions], positions, 5)

    for gathered in run_together(2, work):
        assert gathered.numpy().tobytes() == values.numpy().tobytes()


def test_empty_share_changes_and_records_nothing():
    model = build_mlp((4,), (5,), 3, seed=0)
    step = FusedStep(model, torch.optim.SGD(model.parameters(), lr=0.1), record=True)
    before = flatten_parameters(model).clone()
    step(torch.empty(0, 4), torch.empty(0, dtype=torch.int64), 1)
    assert torch.equal(flatten_parameters(model), before)
    assert step.take().shape == (2, 0)


def test_diverging_run_ends_in_the_same_epoch_for_every_worker():
    results_by_rank = run_together(2, lambda group: train(group, np.float32, learning_rate=1e18))
    for results in results_by_rank:
        assert [record.epoch for record, _ in results] == [0, 1]
        assert results[-1][0].diverged
    # The parameters are NaN with equal bytes; a comparison of digests accepts them as equal.
    assert len({results[-1][1].numpy().tobytes() for results in results_by_rank}) == 1
