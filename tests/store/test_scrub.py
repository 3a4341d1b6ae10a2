"""Every byte of a finished study is verified: a flip anywhere is found, and named."""

import warnings

import numpy as np
import pytest
from rich.console import Console
from study_here import command, make_config, values_of

from sampimp.errors import DamageWarning
from sampimp.store.location import Folder
from sampimp.store.manifests import write_manifest
from sampimp.store.plan import read_commits
from sampimp.store.plan_files import require_plan
from sampimp.store.score_files import write_scores
from sampimp.store.sharded import consolidate
from sampimp.store.snapshots import SNAPSHOTS, write_snapshot
from sampimp.sweeps import status
from sampimp.sweeps.influence_study import compute_influence
from sampimp.sweeps.verification import verify_study, withdraw_damaged

QUIET = Console(quiet=True)
LISTS = ("COMMIT.json", ".manifest.json", "study.json", "snapshots.json")
"""Endings of the files that list others, and of those that stand for themselves; so do plans."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study with everything that a store may hold; the report is two files."""
    out = tmp_path_factory.mktemp("finished") / "study"
    command(make_config(out))
    compute_influence(out, ["mean"], strategy="shuffle", seed=1)
    folder = Folder.of(out)
    write_scores(folder, np.arange(24.0))
    plan, trial = require_plan(folder), next(iter(read_commits(folder)))
    values = np.ones((3, 24), np.float32)
    digests = write_snapshot(folder / "trials" / trial, plan.layout("digits"), 2, values)
    folder.write_json(SNAPSHOTS, {trial: {"2": digests}})
    write_manifest(folder, f"trials/{trial}/snapshots.zarr")
    for name in ("report.html", "digits/figure.png"):
        folder.write_bytes(f"analysis/{name}", name.encode() * 20)
    write_manifest(folder, "analysis")
    consolidate(out)
    return folder


def verify(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DamageWarning)
        return verify_study(folder, require_plan(folder), QUIET)


def flipped(content, position, bit):
    changed = bytearray(content)
    changed[position] ^= 1 << bit
    return bytes(changed)


def is_list(path):
    return path.endswith(LISTS) or path.startswith("plans/")


def test_a_finished_study_is_as_it_was_written(finished, capsys):
    findings = verify(finished)
    assert findings.damaged == []
    assert status.main([str(finished), "--root", str(findings.root)]) == 0
    assert status.main([str(finished), "--root", "0" * 64]) == 1
    assert "another study" in capsys.readouterr().out


@pytest.mark.parametrize("region", range(8))
def test_a_flip_in_every_file_is_found(finished, region):
    """One byte of an eighth of each file is flipped; files that list others stay."""
    paths = [path for path in finished.walk() if not is_list(path)]
    assert len(paths) > 150
    before = {path: finished.read_bytes(path) for path in paths}
    try:
        for number, (path, content) in enumerate(before.items()):
            position = (2 * region + 1) * len(content) // 16
            finished.write_bytes(path, flipped(content, position, number % 8), durable=False)
        places = {
            f"{part.name}/{place}" for part, damage in verify(finished).damaged for place in damage
        }
    finally:
        for path, content in before.items():
            finished.write_bytes(path, content, durable=False)
    missed = [path for path in paths if not any(place.startswith(path) for place in places)]
    assert missed == []


def test_a_flip_in_every_list_is_found(finished):
    for path in filter(is_list, finished.walk()):
        content = finished.read_bytes(path)
        for position in range(0, len(content), max(1, len(content) // 12)):
            finished.write_bytes(path, flipped(content, position, position % 8), durable=False)
            assert verify(finished).damaged, (path, position)
        finished.write_bytes(path, content, durable=False)
    assert verify(finished).damaged == []


def test_what_is_withdrawn_is_made_again_with_the_same_values(finished, tmp_path):
    folder = Folder.of(tmp_path / "copy")
    for path in finished.walk():
        folder.write_bytes(path, finished.read_bytes(path), durable=False)
    expected = values_of(folder)
    for path in folder.walk():
        if not is_list(path):
            folder.write_bytes(path, b"damage", durable=False)
    withdraw_damaged(folder, verify(folder), QUIET)
    command(make_config(str(folder)))
    assert values_of(folder) == expected
    assert {part.kind for part, _ in verify(folder).damaged} == {
        "analysis",
        "consolidated",
        "scores",
    }


def test_verifying_writes_nothing_and_continues(finished, tmp_path):
    done = tmp_path / "done"
    before = {path: finished.read_bytes(path) for path in finished.walk()}
    assert verify_study(finished, require_plan(finished), QUIET, done_file=done).damaged == []
    lines = done.read_text().splitlines()
    assert len(lines) > 5
    assert {path: finished.read_bytes(path) for path in finished.walk()} == before
    assert verify_study(finished, require_plan(finished), QUIET, done_file=done).damaged == []
    assert sorted(set(done.read_text().splitlines())) == sorted(lines)
