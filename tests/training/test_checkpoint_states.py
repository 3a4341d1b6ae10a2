"""A checkpoint that loads runs no code; what is no state of the run is a named error."""

import io
import os
import pickle
import zipfile

import numpy as np
import oracles
import pytest
import torch

from sampimp.data import scale_inputs
from sampimp.training.checkpoint_states import UnusableCheckpointError, load_tensors, restoring
from sampimp.training.loop import TrainingRun
from sampimp.training.strategies import make_schedule


def make_run(**changes):
    config = oracles.trial_config(**({"optimizer": "momentum"} | changes))
    data = scale_inputs(oracles.make_source(), "unit")
    schedule = make_schedule("shuffle", len(data.train_labels), config.training.batch_size, 0, None)
    return TrainingRun(config, data, schedule)


def trained(epochs=1, **changes):
    run = make_run(**changes)
    records = run.records()
    while run.epoch < epochs:
        next(records)
    return run


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def saved(value, **options):
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def repacked(state, compression=zipfile.ZIP_DEFLATED):
    """Return the same archive, compressed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(state)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name), compression)
    return buffer.getvalue()


def with_pickle(state, content):
    """Return the same archive with another pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(state)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            new.writestr(name, content if name.endswith("data.pkl") else old.read(name))
    return buffer.getvalue()


@pytest.mark.parametrize("place", ["state", "model", "legacy", "pickle"])
def test_a_pickle_bomb_does_not_go_off(tmp_path, place):
    bomb, state = Bomb(str(tmp_path / "made")), trained().state()
    content = {
        "state": lambda: saved({"epoch": 1, "model": bomb}),
        "model": lambda: with_pickle(state, pickle.dumps({"epoch": 1, "model": bomb}, 2)),
        "legacy": lambda: saved(bomb, _use_new_zipfile_serialization=False),
        "pickle": lambda: pickle.dumps(bomb),
    }[place]()
    with pytest.raises(UnusableCheckpointError):
        make_run().restore(content, 1)
    assert not (tmp_path / "made").exists()
    if place == "pickle":
        pickle.loads(content)  # the bomb is one
        assert (tmp_path / "made").exists()


def changed(**changes):
    value = torch.load(io.BytesIO(trained().state()), weights_only=True)
    return saved(value | changes)


def with_momentum(tensor):
    value = torch.load(io.BytesIO(trained().state()), weights_only=True)
    value["optimizer"]["state"][0]["momentum_buffer"] = tensor
    return saved(value)


STATES = {
    "nothing": lambda: b"",
    "garbage": lambda: bytes(range(256)) * 40,
    "truncated": lambda: trained().state()[:-200],
    "compressed": lambda: repacked(trained().state()),
    "a list": lambda: saved([1, 2]),
    "a tensor": lambda: saved(torch.ones(3)),
    "no model": lambda: saved({"epoch": 1}),
    "another epoch": lambda: trained(2).state(),
    "another network": lambda: trained(hidden=(7, 5)).state(),
    "another optimizer": lambda: trained(optimizer="adam").state(),
    "a model of numbers": lambda: changed(model={"0.weight": 1}),
    "momentum of another shape": lambda: with_momentum(torch.ones(2, 2)),
    "a tensor larger than its storage": lambda: changed(
        model={"0.weight": torch.ones(1).expand(10**6, 10**6)}
    ),
}


@pytest.mark.parametrize("name", STATES)
def test_what_is_no_state_of_the_run_is_a_named_error(name):
    state = STATES[name]()
    with pytest.raises(UnusableCheckpointError, match="a state of shuffle, seed 1, after epoch 1"):
        make_run().restore(state, 1)


def test_a_tensor_that_claims_a_terabyte_is_refused_before_it_is_allocated():
    state = saved({"weight": torch.ones(4)})
    with zipfile.ZipFile(io.BytesIO(state)) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
        content = archive.read(name)
    size, huge = b"K\x04\x85", b"\x8a\x06" + (2**40).to_bytes(6, "little") + b"\x85"
    assert size in content  # the shape, a tuple of one
    state = with_pickle(state, content.replace(size, huge))
    with pytest.raises(UnusableCheckpointError, match="4,398,046,511,104 bytes"), restoring("it"):
        load_tensors(state, "cpu")


def test_views_and_shared_tensors_are_loaded():
    whole = torch.arange(6.0)
    state = {"a": whole[:3], "b": whole[3:], "same": [whole, whole.view(2, 3)]}
    loaded = load_tensors(saved(state), "cpu")
    np.testing.assert_array_equal(loaded["same"][1], whole.view(2, 3))


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "adamw"])
def test_a_state_of_the_run_is_restored(optimizer):
    run = make_run(optimizer=optimizer)
    run.restore(trained(optimizer=optimizer).state(), 1)
    (first, second) = (list(r.records()) for r in (run, trained(optimizer=optimizer)))
    np.testing.assert_array_equal(first[-1].arrays["nll"], second[-1].arrays["nll"])
