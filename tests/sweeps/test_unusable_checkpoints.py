"""A checkpoint that has its digest and cannot be loaded: the one before is used, or the start."""

import numpy as np
import oracles
import pytest

from sampimp.data import scale_inputs
from sampimp.store.commits import require_commit
from sampimp.store.plan import read_commits
from sampimp.store.record import TrialRecord
from sampimp.sweeps.work import Attempt, Work, perform
from sampimp.training.checkpoint_states import UnusableCheckpointError
from sampimp.training.loop import TrainingRun
from sampimp.training.strategies import make_schedule


class Training(Work):
    """The reference run of a small study, in this process."""

    def __init__(self, study):
        self.folder, plan, self.source = study
        (trial,) = plan.resolve(read_commits(self.folder))
        self.identity, self.layout = oracles.identity_of(trial), plan.layout("one")
        self.description, self.config, self.begun = {}, trial.config, []
        self.place = self.folder / "trials" / trial.trial_id

    def start(self, checkpoint):
        self.begun.append(checkpoint and checkpoint[0])
        data = scale_inputs(self.source, "unit")
        batch_size = self.config.training.batch_size
        schedule = make_schedule("shuffle", len(data.train_labels), batch_size, 0, None)
        self.run = TrainingRun(self.config, data, schedule)
        if checkpoint is not None:
            self.run.restore(checkpoint[1], checkpoint[0])
        self.records = self.run.records()

    def advance(self):
        return next(self.records, None)

    def state(self):
        return self.run.state()


@pytest.fixture
def make_study(tmp_path):
    def make(name):
        source = oracles.make_source()
        plan = oracles.make_plan({"one": source}, {"shuffle": (1,)}, epochs=4)
        return oracles.start_study(tmp_path / name, plan, {"one": source}), plan, source

    return make


def interrupted(study, epochs, spoil):
    """Train some epochs; the states of those in `spoil` are written as other bytes."""
    work = Training(study)
    attempt = Attempt(work.place, work)
    attempt.begin()
    work.state = lambda: spoil.get(work.run.epoch, work.run.state)()
    for _ in range(epochs):
        attempt.advance()


def garbage():
    return b"these bytes are no state, and have their digest in the manifest"


@pytest.mark.parametrize(
    ("spoil", "begun"),
    [({}, [3]), ({3: garbage}, [3, 2]), ({2: garbage, 3: garbage}, [3, 2, None])],
    ids=["sound", "the newest", "both"],
)
def test_the_checkpoint_before_is_used_and_the_values_are_the_same(make_study, spoil, begun):
    whole, resumed = make_study("whole"), make_study("resumed")
    interrupted(resumed, 3, spoil)
    commits = []
    for study in (whole, resumed):
        work = Training(study)
        perform(work.place, work, lambda step, steps: None)
        commits.append(require_commit(work.place))
    assert work.begun == begun
    for entry in ("digests", "curves", "epochs"):
        assert commits[0][entry] == commits[1][entry]
    np.testing.assert_equal(len(commits[1]["seconds"]), 4)


def test_an_error_from_the_start_is_not_hidden(make_study):
    study = make_study("study")
    interrupted(study, 2, {})

    class Broken(Training):
        def start(self, checkpoint):
            super().start(checkpoint)
            raise UnusableCheckpointError("a stored state", "another", "states", "nothing")

    work = Broken(study)
    with pytest.raises(UnusableCheckpointError, match="a stored state"):
        perform(work.place, work, lambda step, steps: None)
    assert work.begun == [2, 1, None]
    errors = list((study[0] / "trials").walk())
    assert any("errors/" in name for name in errors)


def test_another_error_keeps_the_checkpoints(make_study):
    study = make_study("study")
    interrupted(study, 2, {})

    class OutOfMemory(Training):
        def start(self, checkpoint):
            raise MemoryError

    work = OutOfMemory(study)
    with pytest.raises(MemoryError):
        perform(work.place, work, lambda step, steps: None)
    work = Training(study)
    perform(work.place, work, lambda step, steps: None)
    assert work.begun == [2]


def test_a_checkpoint_beyond_the_last_step_is_not_used(make_study):
    study = make_study("study")
    work = Training(study)
    record = TrialRecord(work.place, work.identity, work.layout)
    record.checkpoint(5, b"state")
    assert TrialRecord(work.place, work.identity, work.layout).newest_checkpoint() is None
