"""Four drivers of one study, one of which is killed; `make drivers` has more seeds."""

import drivers
import pytest
from processes import TRAIN, Driver

from sampimp.store.location import Folder
from sampimp.store.plan import read_commits
from sampimp.store.plan_files import require_plan


@pytest.mark.timeout(480)
def test_four_drivers_complete_every_grid(tmp_path):
    lines = []
    drivers.train_alone(tmp_path / "alone")
    run = drivers.play(tmp_path, seed=1, deaths=1, say=lines.append)
    assert len(run.deaths) == 1, lines
    assert run.starts == 5
    assert len(run.commits) == 7


def test_of_two_drivers_that_differ_one_trains_and_the_other_is_refused(tmp_path):
    rates = (0.1, 0.2)
    grid = (*drivers.STUDY, "--strategies", "shuffle", "--seeds", "1", "--learning-rate")
    started = [Driver(tmp_path, (*grid, str(rate)), door=TRAIN) for rate in rates]
    try:
        ends = dict(zip(rates, (driver.communicate() for driver in started), strict=True))
    finally:
        for driver in started:
            driver.close(0)
    plan = require_plan(Folder.of(tmp_path))
    stored = plan.training.learning_rate
    (refused,) = {*rates} - {stored}
    assert (ends[stored][0], ends[refused][0]) == (0, 2), ends
    assert f"learning_rate {stored} (requested: {refused})" in ends[refused][1]
    assert "Traceback" not in ends[refused][1]
    (trial,) = plan.resolve(read_commits(Folder.of(tmp_path)))
    assert trial.commit is not None
    assert [path.name for path in (tmp_path / "trials").iterdir()] == [trial.trial_id]
