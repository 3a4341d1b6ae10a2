"""What reads a study that somebody else may have made, as the commands and functions do it.

Map: `readers` (those of one case); `load_all`.
"""

import contextlib
import io
import json
import os
import random
import shutil
from pathlib import Path

import oracles
from fuzz_study import REQUEST, quick_report, start_run
from rich.console import Console
from study_here import TeamHere

import sampimp
from sampimp.analysis.explorer.explorer_writer import write_explorer
from sampimp.analysis.sample_frame import to_frame
from sampimp.data import load_source
from sampimp.store.influence_layouts import INFLUENCE_FOLDER
from sampimp.store.location import Folder
from sampimp.store.plan import read_commits
from sampimp.store.plan_files import require_plan, store_plan
from sampimp.store.record import TrialRecord
from sampimp.store.sharded import consolidate
from sampimp.sweeps import status
from sampimp.sweeps.full_study import write_study_report
from sampimp.sweeps.influence_study import compute_influence
from sampimp.sweeps.stored_study import require_source
from sampimp.sweeps.subset_results import diverged_trainings, export_subsets, next_sizes
from sampimp.sweeps.subset_study import prepare_subsets
from sampimp.sweeps.trial import TrainingWork
from sampimp.sweeps.trial_inputs import TrialInputs
from sampimp.sweeps.work import perform, training_units
from sampimp.training.checkpoint_states import UnusableCheckpointError

LARGEST = 2**26
"""Bytes of a variable that is computed: a plan may state more parameters than fit."""

HOSTILE = ("<script>alert(1)", "<img src=x")
"""Starts of texts that a page may show, and never contain."""


def read_cube(root):
    tree = sampimp.open_cube(root / "study")
    shown = str(tree), tree._repr_html_()
    _require_harmless(shown[1], "the tree in HTML")
    for node in tree.subtree:
        cube = node.to_dataset(inherit=False)
        small = [name for name, variable in cube.variables.items() if variable.nbytes < LARGEST]
        cube.drop_vars(set(cube.variables) - set(small)).compute()


def read_status(root):
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        status.main([str(root / "study"), "--verify"])
    assert "\x1b[31m" not in text.getvalue(), "a control character on the terminal"


def read_checkpoints(root):
    """Plan as a driver does, and continue each unfinished trial as a worker does."""
    folder = Folder.of(root / "study")
    plan = require_plan(folder)
    trials = plan.resolve(read_commits(folder))
    for unit, trial in zip(training_units(plan, trials), trials, strict=True):
        if unit.folder is None or unit.commit is not None:
            continue
        identity, layout = oracles.identity_of(trial), plan.layout(trial.config.dataset)
        record = TrialRecord(folder / unit.folder, identity, layout)
        while (checkpoint := record.newest_checkpoint()) is not None:
            run, _ = start_run(plan, trial, oracles.make_source(shape=(1, 4, 4)))
            try:
                run.restore(checkpoint[1], checkpoint[0])
                break
            except UnusableCheckpointError:
                record.discard_checkpoint()


# One of these a case.
def withdraw(root):
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        status.main([str(root / "study"), "--withdraw"])


def continue_study(root):
    """Join the plans as a driver does, then train what is missing as workers do."""
    folder = Folder.of(root / "study")
    plan, _ = store_plan(folder, _requested())
    inputs = TrialInputs(folder, plan, lambda key: require_source(folder, key))
    for _ in range(2):  # the references first
        for unit in training_units(plan, plan.resolve(read_commits(folder))):
            if unit.folder is not None and unit.commit is None:
                work = TrainingWork(TeamHere(inputs, plan), plan, unit.config)
                perform(folder / unit.folder, work, lambda step, of: None)
    read_cube(root)


def _requested():
    """Return the plan of the driver that began the study."""
    sources = {"one": oracles.make_source(shape=(1, 4, 4))}
    return oracles.make_plan(sources, {"shuffle": (1, 2)}, epochs=3, optimizer="momentum")


def read_frame(root):
    cube = sampimp.open_cube(root / "study")
    for strategy in ("shuffle", "rand"):
        to_frame(cube, strategy=strategy)


def consolidate_again(root):
    """Consolidate the study of the first driver, which is complete, over the copy and anew."""
    for name in ("plans/0002.json", "study.json"):
        path = root / "study" / name
        if path.is_file() or path.is_symlink():
            path.unlink()
    consolidate(root / "study")
    consolidate(root / "study", root / "study" / "copy")


def explore(root):
    study = root / "study"
    write_explorer(str(study), keep=True)
    write_explorer(str(study), runs=("all",), keep=False)
    for path in (study / "analysis/explore").rglob("*"):
        if path.is_file() and path.suffix in (".html", ".css"):
            _require_harmless(path.read_text(), path.name)
        elif path.is_file() and path.suffix == ".js" and "data" in path.parts:
            text = path.read_text()
            assert text.startswith("sampimpData({"), f"another script in {path.name}"
            json.loads(text.removeprefix("sampimpData(").removesuffix(");\n"))


def report(root):
    """Write the report, first as if the summary was of the same records."""
    study = root / "study"
    text = io.StringIO()
    console = Console(file=text)
    sizes = sum(os.path.getsize(path) for path in study.glob("*/*/COMMIT.json"))
    with quick_report(random.Random(sizes)):
        write_study_report(str(study), console)
        summary = study / "analysis/summary.json"
        summary.unlink()
        write_study_report(str(study), console)
    assert "\x1b[31m" not in text.getvalue(), "a control character on the terminal"
    _require_harmless((study / "analysis/report.html").read_text(), "the report")


def compare_subsets(root):
    """List what is left to train on subsets, as the command does; then its results."""
    folder = Folder.of(root / "study")
    prepare_subsets(folder, REQUEST, stores_scores=True).units.resolve()
    diverged_trainings(folder)
    export_subsets(folder, REQUEST)
    next_sizes(folder, REQUEST, 0.1)


def go_backward(root):
    """Compute the influence on a further target, with the stored states."""
    compute_influence(root / "study", ["class:2"], strategy="shuffle", seed=1)
    commits = read_commits(Folder.of(root / "study"), INFLUENCE_FOLDER)
    assert commits


def read_npz(root):
    load_source(f"npz:{root / 'a.npz'}")


def read_images(root):
    load_source(f"folder:{root / 'images'}")


def _require_harmless(page, where):
    for text in HOSTILE:
        assert text not in page, f"{text} in {where}"


OFTEN = (read_cube, read_status, read_checkpoints)
"""The cheap readers of a study; the first two write nothing."""
SELDOM = (
    *(withdraw, continue_study, read_frame, consolidate_again, explore, report),
    *(compare_subsets, go_backward),
)
READ_ONLY = (read_cube, read_status, read_frame)


def readers(part, draw):
    """Return what reads the part that was changed: of a study one of eleven."""
    if part == "study":
        return (draw.choice((*OFTEN, *SELDOM)),)
    return (read_npz,) if part == "a.npz" else (read_images,)


def load_all(master):
    """Read everything once: imports, threads and caches take memory once."""
    for read in (*OFTEN, *SELDOM, read_npz, read_images):
        copy = Path(f"{master}-copy")
        shutil.copytree(master, copy)
        read(copy)
        shutil.rmtree(copy)
