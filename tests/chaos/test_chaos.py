"""A short storm; `make chaos` is the long one."""

from io import StringIO

import chaos
import pytest
from rich.console import Console


@pytest.mark.timeout(240)
def test_a_tormented_study_has_the_same_bytes(tmp_path, monkeypatch):
    """The driver, a worker and the head die, and the store is damaged."""
    monkeypatch.setattr(chaos, "EPOCHS", 8)
    monkeypatch.setattr(chaos, "TRIALS", 3)
    study = (
        *("--preset", "digits", "--hidden", "16", "--epochs", "8", "--batch-size", "5"),
        *("--strategies", "shuffle", "rand", "nlo", "--reference-seeds", "1", "--seeds", "1"),
    )
    monkeypatch.setattr(chaos, "STUDY", study)
    chaos.leave_alone(tmp_path / "alone")
    tally = chaos.torment(tmp_path / "study", 3, seed=1, say=Console(file=StringIO()))
    assert chaos.differing_bytes(tmp_path / "study", tmp_path / "alone") == 0
    assert sum(tally.deaths.values()) == 3
    assert max(tally.lost) <= 1
