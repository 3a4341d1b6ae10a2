"""A stored study is replayed: parameters, batches and data give the recorded importance.

The replay is NumPy in float64 and uses only the cube and the data set. From the parameters at the
start of an epoch it takes the epoch's steps, batch by batch. Its importance may differ from the
recorded one only by the rounding of float32.
"""

import logging
import os
from io import StringIO

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # Ray on loopback only

import numpy as np
import pytest
import ray
from rich.console import Console

import sampimp
from sampimp.schema import REFERENCES, STRATEGIES
from sampimp.sweeps import run
from sampimp.sweeps.machines import Cluster, Machines
from sampimp.sweeps.options import parse

EPOCHS = 3
BATCH_SIZE = 60
BATCHES = 1500 // BATCH_SIZE

ARGUMENTS = (
    *("--preset", "digits", "--hidden", "32", "24", "--epochs", str(EPOCHS)),
    *("--influence", "--subsets"),  # none
    *("--batch-size", str(BATCH_SIZE), "--weight-decay", "0.001"),  # large enough to matter
    *("--seeds", "1", "--reference-seeds", "1"),
)


@pytest.fixture(scope="module")
def cube(tmp_path_factory):
    """A study of every strategy with one seed, on the digits."""
    out = tmp_path_factory.mktemp("replay") / "study"
    starts_ray = not ray.is_initialized()
    if starts_ray:
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=100 * 2**20,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            run, "join_cluster", lambda address: Cluster("tests", (Machines(1, cpus=2, gpus=0),))
        )
        config = parse([*ARGUMENTS, "--out", str(out)])
        assert run.run_study(config, Console(file=StringIO())) == 0
    if starts_ray:
        ray.shutdown()
    return sampimp.open_cube(out)["digits"].to_dataset()


class Replay:
    """The paper's network in float64, from the parameters of one state of one trial."""

    def __init__(self, cube, trial, state):
        data = sampimp.load_dataset("digits")
        self.inputs_NI = data.train_inputs.reshape(len(data.train_inputs), -1).astype(np.float64)
        self.labels_N = data.train_labels
        self.rate = cube.importance.attrs["learning_rate"]
        self.decay = cube.importance.attrs["weight_decay"]
        self.layers = self._unpack(cube, trial.parameters.sel(state=state).values)

    def _unpack(self, cube, parameters_P):
        """Return weight [O, I] and bias [O] of each layer."""
        assert parameters_P.dtype == np.float32
        owner_P = cube.layer_of_parameter.values
        fan_in, layers = self.inputs_NI.shape[1], []
        for name in cube.layer.values:
            values = parameters_P[owner_P == name].astype(np.float64)
            fan_out, rest = divmod(len(values), fan_in + 1)
            assert rest == 0
            weight, bias = np.split(values, [fan_out * fan_in])
            layers.append((weight.reshape(fan_out, fan_in), bias))
            fan_in = fan_out
        return layers

    @property
    def parameters(self):
        return np.concatenate([values.ravel() for layer in self.layers for values in layer])

    def step(self, index):
        """Take one step of SGD, and return the importance of its samples, [layer, sample].

        Every per-sample gradient is computed in full, [sample, parameter], and squared.
        """
        activations = [self.inputs_NI[index]]
        for weight, bias in self.layers[:-1]:
            activations.append(np.maximum(activations[-1] @ weight.T + bias, 0))
        weight, bias = self.layers[-1]
        logits = activations[-1] @ weight.T + bias
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        delta_NO = odds / odds.sum(axis=1, keepdims=True)
        delta_NO[np.arange(len(index)), self.labels_N[index]] -= 1
        importance, updated = [], []
        for (weight, bias), activation_NI in zip(
            reversed(self.layers), reversed(activations), strict=True
        ):
            gradient_NOI = delta_NO[:, :, None] * activation_NI[:, None, :]
            affectibility = self.rate / len(index)
            squares_N = np.square(affectibility * gradient_NOI).sum(axis=(1, 2))
            importance.append(squares_N + np.square(affectibility * delta_NO).sum(axis=1))
            updated.append(
                (
                    weight - self.rate * (gradient_NOI.mean(axis=0) + self.decay * weight),
                    bias - self.rate * (delta_NO.mean(axis=0) + self.decay * bias),
                )
            )
            delta_NO = (delta_NO @ weight) * (activation_NI > 0)
        self.layers = updated[::-1]
        return np.array(importance[::-1])


def test_every_strategy_is_recorded(cube):
    assert cube.strategy.values.tolist() == [*REFERENCES, *STRATEGIES]
    assert not np.isnan(cube.importance).any()


@pytest.mark.parametrize("strategy", [*REFERENCES, *STRATEGIES])
@pytest.mark.parametrize("epoch", range(1, EPOCHS + 1))
def test_replay_gives_recorded_importance_and_parameters(cube, strategy, epoch):
    trial = cube.sel(strategy=strategy, seed=1).load()
    replay = Replay(cube, trial, state=epoch - 1)
    batch_N = trial.batch.sel(epoch=epoch).values
    recorded_LN = trial.importance.sel(epoch=epoch).values
    errors = []
    for position in range(BATCHES):
        index = np.flatnonzero(batch_N == position)
        assert len(index) == BATCH_SIZE
        expected_LN = replay.step(index)
        errors.append(np.abs(recorded_LN[:, index] - expected_LN) / expected_LN)

    # The first batch is trained at exactly the stored parameters, so that the only difference is
    # float32 rounding. Measured: median 1.2e-7, largest 6e-7.
    assert np.median(errors[0]) < 1e-6
    assert errors[0].max() < 1e-5
    # Later batches are trained at parameters that were rounded in every step; a ReLU unit near zero
    # may even be active in only one of the two. Measured: median 1.6e-7, largest 2e-6.
    assert np.median(np.concatenate(errors, axis=1)) < 1e-5
    assert max(error.max() for error in errors) < 1e-3

    start_P, end_P = trial.parameters.sel(state=[epoch - 1, epoch]).values
    # A step rounds a parameter by at most half an ulp, 2^-24 of its value, and adds a smaller error
    # of its gradient. The bound is twice that, for each of 25 steps. Measured: a fifth of it.
    bound = 2 * BATCHES * 2.0**-24 * np.abs(end_P).max()
    assert np.abs(end_P - replay.parameters).max() < bound
    # The bound is tight enough to detect errors: the epoch moves parameters by 1e4 times as much,
    # and weight decay alone by 0.1 x 0.001 x 25 of a parameter, which is 400 times as much.
    assert np.abs(end_P - start_P).max() > 1e4 * bound
    assert replay.rate * replay.decay * BATCHES * np.abs(end_P).max() > 400 * bound
