"""What a recorder keeps of the steps: layers, epochs, learning rates, indices, the dataset."""

import copy

import numpy as np
import oracles
import pytest
import torch
import xarray as xr
from recording import SGD, batch, freeze, recorded, train_step
from torch import nn
from torch.nn import functional

import sampimp.importance.optimizers
from sampimp.errors import ConfigError
from sampimp.importance.recorder import ImportanceRecorder
from sampimp.training.models import flatten_parameters

pytestmark = pytest.mark.usefixtures("one_thread")


def freeze_bias(model):
    model[2].bias.requires_grad_(False)


@pytest.mark.parametrize(
    ("change", "silent"),
    [
        (freeze(0), [0]),
        (freeze(2), [1]),
        (freeze(0, 2), [0, 1]),
        (freeze(4), [2]),
        (freeze_bias, []),
    ],
    ids=["first", "middle", "first two", "last", "a bias"],
)
@pytest.mark.parametrize("offered", [True, False], ids=["in the optimizer", "left out"])
def test_frozen_layers_have_no_importance(change, silent, offered):
    model = oracles.tiny_mlp((4, 5, 5, 3), nn.Tanh)
    change(model)
    trained = [p for p in model.parameters() if offered or p.requires_grad]
    optimizer, (inputs, labels) = SGD(trained, lr=0.2), batch()
    expected = oracles.importance_by_autograd(model, optimizer, inputs, labels)
    got = recorded(model, optimizer, inputs, labels)
    assert oracles.close(got, expected)
    assert (got == 0).all(1).nonzero().flatten().tolist() == silent


def test_a_first_layer_frozen_later_has_no_importance_from_then_on():
    model, (inputs, labels) = oracles.tiny_mlp((4, 5, 5, 3), nn.Tanh), batch()
    optimizer = SGD(model.parameters(), lr=0.2)
    recorder = ImportanceRecorder(model, optimizer)
    for epoch in (1, 2):
        expected = oracles.importance_by_autograd(model, optimizer, inputs, labels)
        with recorder.step(range(6), epoch=epoch):
            train_step(model, optimizer, inputs, labels)
        assert oracles.close(recorder.pop_epoch(epoch, 6), expected)
        freeze(0)(model)


def test_rate_of_the_step_counts_when_a_scheduler_changes_it():
    model, (inputs, labels) = oracles.tiny_mlp(), batch()
    optimizer = SGD(model.parameters(), lr=0.2)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    recorder = ImportanceRecorder(model, optimizer)
    for epoch in (1, 2):
        expected = oracles.importance_by_autograd(model, optimizer, inputs, labels)
        with recorder.step(range(6), epoch=epoch):
            train_step(model, optimizer, inputs, labels)
        assert oracles.close(recorder.pop_epoch(epoch, 6), expected)
        scheduler.step()


def test_groups_added_after_the_recorder_was_made_count():
    model, (inputs, labels) = oracles.tiny_mlp(), batch()
    optimizer = SGD(model[2].parameters(), lr=0.2)
    recorder = ImportanceRecorder(model, optimizer)
    optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 0.3})
    expected = oracles.importance_by_autograd(model, optimizer, inputs, labels)
    with recorder.step(range(6), epoch=1):
        train_step(model, optimizer, inputs, labels)
    assert oracles.close(recorder.pop_epoch(1, 6), expected)


def test_rates_restored_after_the_recorder_was_made_count():
    # load_state_dict replaces the parameter groups.
    model, (inputs, labels) = oracles.tiny_mlp(), batch()
    optimizer = SGD(model.parameters(), lr=0.2)
    recorder = ImportanceRecorder(model, optimizer)
    optimizer.load_state_dict(SGD(oracles.tiny_mlp().parameters(), lr=0.7).state_dict())
    expected = oracles.importance_by_autograd(model, optimizer, inputs, labels)
    with recorder.step(range(6), epoch=1):
        train_step(model, optimizer, inputs, labels)
    assert oracles.close(recorder.pop_epoch(1, 6), expected)


class Reversed(nn.Module):
    """A model that registers its layers in another order than it calls them."""

    def __init__(self):
        super().__init__()
        self.second, self.first = nn.Linear(5, 3), nn.Linear(4, 5)

    def forward(self, inputs):
        return self.second(torch.relu(self.first(inputs)))


def test_layers_are_labelled_in_forward_order():
    model, (inputs, labels) = Reversed().double(), batch()
    optimizer = SGD(model.parameters(), lr=0.2)
    # The oracle has the layers in the order of registration: second, first.
    expected = oracles.importance_by_autograd(model, optimizer, inputs, labels).flip(0)
    recorder = ImportanceRecorder(model, optimizer)
    with recorder.step(range(6), epoch=1):
        train_step(model, optimizer, inputs, labels)
    importance = recorder.to_dataset()["importance"]
    assert importance["layer"].values.tolist() == ["first", "second"]
    np.testing.assert_allclose(importance[0], expected.numpy(), rtol=1e-6)


def test_a_sample_used_twice_is_summed_and_an_unused_one_is_nan():
    model, (inputs, labels) = oracles.tiny_mlp(), batch()
    optimizer = SGD(model.parameters(), lr=0.2)
    recorder = ImportanceRecorder(model, optimizer)
    expected = torch.zeros(2, 8, dtype=torch.float64)
    used = torch.zeros(8, dtype=torch.bool)
    for rows in ([5, 0, 2], [2, 4], [2, 0]):  # batch sizes differ, and with them the factor 1/B
        x, y = inputs[rows], labels[rows]
        expected[:, rows] += oracles.importance_by_autograd(model, optimizer, x, y)
        used[rows] = True
        with recorder.step(rows, epoch=3):
            train_step(model, optimizer, x, y)
    dataset = recorder.to_dataset(sample_count=8)
    got = recorder.pop_epoch(3, 8)
    assert oracles.close(got[:, used], expected[:, used])
    assert got[:, ~used].isnan().all()
    assert (~used).nonzero().flatten().tolist() == [1, 3, 6, 7]
    np.testing.assert_allclose(dataset["importance"][0], got.numpy(), rtol=1e-6)


@pytest.mark.filterwarnings("ignore:.*does not have a Zarr V3 specification")
def test_the_dataset_is_labelled(tmp_path):
    model, (inputs, labels) = oracles.tiny_mlp(), batch()
    optimizer = SGD(model.parameters(), lr=0.2, weight_decay=0.01)
    recorder = ImportanceRecorder(model, optimizer, loss_reduction="sum")
    for epoch in (2, 1):
        for rows in (torch.tensor([0, 5, 3]), np.array([1, 4])):
            with recorder.step(rows, epoch=epoch):
                train_step(model, optimizer, inputs[rows], labels[rows], "sum")
    dataset = recorder.to_dataset()
    importance = dataset["importance"]
    assert importance.dims == ("epoch", "layer", "sample")
    assert importance.dtype == np.float32
    assert importance["epoch"].values.tolist() == [1, 2]
    assert importance["layer"].values.tolist() == ["0", "2"]
    assert importance["sample"].values.tolist() == list(range(6))  # the largest index, plus 1
    assert np.isnan(importance.sel(sample=2)).all()
    expected = {
        "units": "parameter^2",
        "learning_rate": 0.2,
        "batch_size": 3,
        "loss_reduction": "sum",
        "weight_decay": 0.01,
        "optimizer": "SGD",
    }
    assert {key: importance.attrs[key] for key in expected} == expected
    dataset.to_zarr(tmp_path / "importance.zarr", consolidated=False)
    stored = xr.open_zarr(tmp_path / "importance.zarr", consolidated=False)
    xr.testing.assert_identical(stored.load(), dataset)


def test_each_step_of_each_epoch_is_exact_before_any_epoch_is_read():
    """Record three epochs of uneven batches, and compare with the oracle of single samples."""
    inputs, labels = batch(samples=7)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    optimizer = SGD(model.parameters(), lr=0.3)
    recorder = ImportanceRecorder(model, optimizer)
    expected = np.zeros((3, 2, 7))
    for epoch in (1, 2, 3):
        for index in torch.randperm(7).split(3):
            for i in index.tolist():
                copied = copy.deepcopy(model)
                loss = functional.cross_entropy(copied(inputs[[i]]), labels[[i]]) / len(index)
                squares = [
                    grad.square().sum()
                    for grad in torch.autograd.grad(loss, [*copied.parameters()])
                ]
                expected[epoch - 1, :, i] = [
                    0.09 * (squares[0] + squares[1]),
                    0.09 * (squares[2] + squares[3]),
                ]
            with recorder.step(index, epoch=epoch):
                train_step(model, optimizer, inputs[index], labels[index])
    beta = recorder.to_dataset()["importance"]
    np.testing.assert_allclose(beta, expected, rtol=1e-6)


def test_a_popped_epoch_is_forgotten():
    model, (inputs, labels) = oracles.tiny_mlp(), batch()
    optimizer = SGD(model.parameters(), lr=0.2)
    recorder = ImportanceRecorder(model, optimizer)
    for epoch in (1, 2):
        with recorder.step(range(6), epoch=epoch):
            train_step(model, optimizer, inputs, labels)
    recorder.pop_epoch(1, 6)
    assert recorder.to_dataset()["epoch"].values.tolist() == [2]


def test_the_reduction_changes_importance_by_the_square_of_the_batch():
    (inputs, labels), values = batch(), {}
    for reduction in ("mean", "sum"):
        model = oracles.tiny_mlp()
        values[reduction] = recorded(
            model, SGD(model.parameters(), lr=0.2), inputs, labels, reduction
        )
    assert oracles.close(values["sum"], 36 * values["mean"])  # B = 6


def test_a_rate_may_be_an_integer(monkeypatch):
    class Whole(SGD):
        pass

    class WholeRule(sampimp.importance.optimizers.SGDRule):
        def after(self, step):
            return -2

    monkeypatch.setitem(sampimp.importance.optimizers.DERIVATIVE_RULES, Whole, WholeRule())
    model, (inputs, labels) = oracles.tiny_mlp(), batch()
    expected = oracles.importance_by_autograd(
        model, SGD(model.parameters(), lr=2.0), inputs, labels
    )
    optimizer = Whole(model.parameters(), lr=2.0)
    recorder = ImportanceRecorder(model, optimizer)
    with recorder.step(range(6), epoch=1):
        train_step(model, optimizer, inputs, labels)
    assert oracles.close(recorder.pop_epoch(1, 6), expected)


def test_gradients_that_are_not_finite_are_recorded_as_such():
    model, (inputs, labels) = oracles.tiny_mlp(), batch()
    inputs[2] = torch.nan
    optimizer = SGD(model.parameters(), lr=0.2)
    recorder = ImportanceRecorder(model, optimizer)
    with recorder.step(range(6), epoch=3):
        train_step(model, optimizer, inputs, labels)
    assert recorder.to_dataset()["importance"].attrs["not_finite_epochs"] == [3]
    beta = recorder.pop_epoch(3, 6)
    assert beta[:, 2].isnan().all()
    assert beta[:, [0, 1, 3, 4, 5]].isfinite().all()
    assert flatten_parameters(model).isnan().any()  # as without the recorder


def test_an_index_beyond_the_training_set_is_refused():
    model, (inputs, labels) = oracles.tiny_mlp(), batch()
    optimizer = SGD(model.parameters(), lr=0.2)
    recorder = ImportanceRecorder(model, optimizer)
    with recorder.step(range(2, 8), epoch=1):
        train_step(model, optimizer, inputs, labels)
    with pytest.raises(ConfigError, match=r"indices below 7(.|\n)*Got 7"):
        recorder.to_dataset(sample_count=7)
    with pytest.raises(ConfigError, match="indices below 7"):
        recorder.pop_epoch(1, 7)
    assert recorder.pop_epoch(1, 8).shape == (2, 8)  # the error has dropped nothing


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ([0, 1, 2, 3, 4, 4], "1 repeated"),
        ([0, 1, 2, 3, 4, -1], "smallest -1"),
        (torch.arange(6).view(2, 3), r"shape \(2, 3\)"),
        (torch.tensor(3), r"shape \(\)"),
        ([0.0, 1.2, 2.0, 3.0, 4.0, 5.0], "torch.float32"),
        (torch.ones(6, dtype=torch.bool), "torch.bool"),
    ],
)
def test_indices_that_name_no_sample_each_are_refused(index, words):
    model = oracles.tiny_mlp()
    recorder = ImportanceRecorder(model, SGD(model.parameters(), lr=0.2))
    with pytest.raises(ConfigError, match=words), recorder.step(index, epoch=1):
        pytest.fail("the block must not run")
