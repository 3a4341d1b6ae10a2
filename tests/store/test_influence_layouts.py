"""Records that are written backward, retrainings and files: resumed, superseded, damaged."""

import numpy as np
import pytest
from influence_made import steps_of

from sampimp.schema import Layout
from sampimp.store.attempts import SupersededError
from sampimp.store.influence_layouts import layout_of
from sampimp.store.integrity import find_damage
from sampimp.store.location import Folder
from sampimp.store.record import TrialRecord
from sampimp.store.variables import StoredVariable, stored_variable

RUN = Layout(epoch=4, layer=2, sample=10, parameter=7, states=(0, 1, 2, 3, 4))

KINDS = {
    "influence": {"targets": ["mean", "class:1"]},
    "probes": {"targets": ["probe:0", "probe:1", "probe:0@L1"]},
    "states": {"targets": []},
    "retrain": {"targets": ["mean"], "removals": ["none", "random:3"], "repeats": 2},
}

IDENTITY = {
    "dataset": "made",
    "strategy": "shuffle",
    "seed": 1,
    "trial": "made-shuffle-seed1-00000000",
    "record": "0" * 64,
    "code": "0",
    "units": ["nat"],
    "smoothing": {"eps": 0.0, "gate_width": 0.0},
    "jitter": 1e-3,
    "renormalised": False,
    "denominator": "batch size kept",
}
OUTCOME = {"growth_epochs": {}}


def make(folder, kind):
    identity = {**IDENTITY, "kind": kind, "fingerprint": kind[0] * 64, **KINDS[kind]}
    layout = layout_of(identity, RUN)
    return TrialRecord(Folder.of(folder), identity, layout), layout


def read_all(folder, layout):
    """Return every value of every variable, by its name."""
    trial = Folder.of(folder)
    commit = trial.read_json("COMMIT.json")
    arrays = {name: commit["curves"][name] for name in commit["curves"]}
    for name in commit["digests"]:
        stored = stored_variable(trial, name, layout, commit)
        count = len(layout.positions(name))
        arrays[name] = [stored.read(position) for position in range(count)]
    return arrays


@pytest.mark.parametrize("kind", KINDS)
def test_a_record_resumed_twice_has_the_values_of_one_that_was_not(tmp_path, kind):
    record, layout = make(tmp_path / "whole", kind)
    steps = {step.step: step for step in steps_of(layout)}
    assert set(steps) - {0} == {1, 2, 3, 4}
    for step in steps.values():
        record.write(step)
    record.commit(None, OUTCOME)

    record, _ = make(tmp_path / "parts", kind)
    for number in sorted(steps)[:-2]:
        record.write(steps[number])
        record.checkpoint(number, b"state %d" % number)
    record.write(steps[3])  # written, and not checkpointed
    second, _ = make(tmp_path / "parts", kind)
    assert second.newest_checkpoint() == (2, b"state 2")
    second.write(steps[3])
    second.checkpoint(3, b"state 3")
    with pytest.raises(SupersededError):
        record.write(steps[4])
    third, _ = make(tmp_path / "parts", kind)
    assert third.newest_checkpoint() == (3, b"state 3")
    third.write(steps[4])
    third.commit(None, OUTCOME)

    whole, parts = (read_all(tmp_path / name, layout) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() == set(layout.variables)
    for name in whole:
        np.testing.assert_array_equal(whole[name], parts[name])
    commits = [Folder.of(tmp_path / name).read_json("COMMIT.json") for name in ("whole", "parts")]
    assert commits[0]["digests"] == commits[1]["digests"]


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_found_in_every_variable(tmp_path, kind):
    record, layout = make(tmp_path, kind)
    for step in steps_of(layout):
        record.write(step)
    record.commit(None, OUTCOME)
    trial = Folder.of(tmp_path)
    commit = trial.read_json("COMMIT.json")
    assert list(find_damage(trial, commit, layout)) == []
    for name, positions in commit["digests"].items():
        for rank in range(len(positions)):
            digests = [list(each) for each in positions]
            digests[rank][0] = "0" * 64
            (damage,) = find_damage(trial, {**commit, "digests": {name: digests}}, layout)
            position = layout.order(name)[rank]
            place = {"states": f", state {position}"}.get(kind, f", epoch {position + 1}")
            assert damage.startswith(f"{name}{place if layout.is_stepwise(name) else ''}: ")


def test_a_backward_record_that_was_not_finished_is_nan_in_its_first_epochs(tmp_path):
    record, layout = make(tmp_path, "influence")
    steps = steps_of(layout)
    for step in steps[:2]:
        record.write(step)
    record.commit(3, OUTCOME)
    trial = Folder.of(tmp_path)
    stored = StoredVariable.of(trial, "influence", layout, trial.read_json("COMMIT.json"))
    np.testing.assert_array_equal(stored.read(3), steps[0].arrays["influence"])
    np.testing.assert_array_equal(stored.read(2), steps[1].arrays["influence"])
    for position in (0, 1):
        assert stored.read(position).shape == (2, 2, 10)
        assert np.isnan(stored.read(position)).all()
    total = StoredVariable.of(trial, "influence_total", layout, trial.read_json("COMMIT.json"))
    assert np.isnan(total.read(0)).all()
    assert total.read(0, slice(2, 5)).shape == (2, 3)


def test_a_changed_or_lost_file_is_named(tmp_path):
    record, layout = make(tmp_path, "states")
    for step in steps_of(layout):
        record.write(step)
    record.commit(None, OUTCOME)
    (tmp_path / "record.zarr/training_state/000002.pt").write_bytes(b"another")
    (tmp_path / "record.zarr/training_state/000004.pt").unlink()
    trial = Folder.of(tmp_path)
    assert list(find_damage(trial, trial.read_json("COMMIT.json"), layout)) == [
        "training_state, state 2: another one, of 7 bytes",
        "training_state, state 4: no file",
    ]
