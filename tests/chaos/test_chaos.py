"""A study with one death and one damaged file; `make chaos` has many."""

from io import StringIO

import chaos
import oracles
import pytest
from rich.console import Console

from sampimp.data import load_source
from sampimp.sweeps.options import parse
from sampimp.sweeps.study import make_plan

STUDY = (
    *(
        "--preset",
        "digits",
        "--hidden",
        "16",
        "--epochs",
        "8",
        "--batch-size",
        "5",
        "--influence",
        "--subsets",
    ),
    *("--strategies", "shuffle", "rand", "nlo", "--reference-seeds", "1", "--seeds", "1"),
)


@pytest.mark.timeout(240)
def test_a_study_with_faults_has_the_bytes_of_a_plain_loop(tmp_path, monkeypatch):
    """The whole head dies, and the store is damaged; the plain loop uses no Ray."""
    sources = {"digits": load_source("digits")}
    plan = make_plan(parse([*STUDY]), sources)
    oracles.run_trials(oracles.start_study(tmp_path / "alone", plan, sources), plan, sources)

    monkeypatch.setattr(chaos, "STUDY", STUDY)
    monkeypatch.setattr(chaos, "TRIALS", 3)
    monkeypatch.setattr(chaos, "EPOCHS", 8)
    monkeypatch.setattr(chaos, "KINDS", ("head",))
    tally = chaos.run_with_faults(tmp_path / "study", 1, seed=1, say=Console(file=StringIO()))
    assert chaos.differing_bytes(tmp_path / "study", tmp_path / "alone") == 0
    assert tally.deaths == {"head": 1}
    assert max(tally.lost) <= 1
    # And no output of Ray between them.
    first, time, machines, start, *more, last = tally.text.splitlines()
    assert first.startswith("3 trials of 8 epochs on digits, into ")
    assert time.startswith("This trains on this machine, for ")
    assert machines.startswith("Ray started here: 1 node, ")
    assert " of 24 epochs; " in start
    assert all(" of 24 epochs; " in line for line in more), more
    assert last == "3 of 3 trials are committed."
