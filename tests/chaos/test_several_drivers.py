"""Four drivers of one study, one of which is killed; `make drivers` has more seeds."""

import drivers
import pytest


@pytest.mark.timeout(480)
def test_four_drivers_complete_every_grid(tmp_path):
    lines = []
    drivers.train_alone(tmp_path / "alone")
    run = drivers.play(tmp_path, seed=1, deaths=1, say=lines.append)
    assert len(run.deaths) == 1, lines
    assert run.starts == 5
    assert len(run.commits) == 7
