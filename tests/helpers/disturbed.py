"""Commands that a fault disturbs, on a tiny study in this process, and what must come of them.

After a fault a command ends with a message, or as if nothing had happened; then the same command
gives what it gives without a fault.

Map: `SCENES`, `Scene`; `outcome` (of a scene), `problem_of` (a disturbed scene).
"""

import contextlib
import gc
import hashlib
import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import xarray as xr
from study_here import begin, command, make_config, values_of

from sampimp.analysis.explorer.explorer_writer import write_explorer
from sampimp.analysis.report import write
from sampimp.analysis.results.analyse import compute_together
from sampimp.analysis.results.curves import strategy_curves
from sampimp.analysis.results.decomposition import decomposition
from sampimp.errors import DamageWarning, RecordError, UserError
from sampimp.store.commits import read_commit
from sampimp.store.influence_layouts import INFLUENCE_FOLDER
from sampimp.store.location import Folder
from sampimp.store.plan import read_commits
from sampimp.store.sharded import consolidate
from sampimp.sweeps import status
from sampimp.sweeps.derived_study import run_here
from sampimp.sweeps.influence_study import compute_influence
from sampimp.sweeps.retrain_study import RetrainRequest, prepare_retrain
from sampimp.sweeps.subset_study import SubsetRequest, prepare_subsets

EVERY = int(os.environ.get("FAULTS_EVERY", "7"))
"""Every which request or operation fails; 1 in `make faults`."""


def _config(out: str, *strategies: str) -> Any:
    return make_config(
        out,
        strategies=strategies,
        reference_seeds=(1,),
        epochs=2,
        hidden=(3,),
        batch_size=12,
        parameters_every=1,
    )


def _nothing(out: str) -> None:
    pass


def _begin(out: str) -> None:
    begin(_config(out, "shuffle"))


def _train(out: str) -> None:
    command(_config(out, "shuffle"))


def _train_sorted(out: str) -> None:
    command(_config(out, "nlo"))


class _InterruptionError(Exception):
    pass


def _interrupt(out: str) -> None:
    def stop(label: str, step: int) -> None:
        raise _InterruptionError

    with contextlib.suppress(_InterruptionError):
        command(_config(out, "shuffle"), step_done=stop)


def _damage(out: str) -> None:
    _train(out)
    (trial,) = read_commits(Folder.of(out))
    chunk = "record.zarr/importance/c/0/0/0"
    (Folder.of(out) / "trials" / trial).write_bytes(chunk, bytes(9))


def _withdraw(out: str) -> None:
    status.show_status(out, False, True)
    _train(out)


def _verify(out: str) -> None:
    assert status.show_status(out, True) == 0, "an intact study is called damaged"


def _report(out: str) -> None:
    """Write a report of two results, without figures."""

    def analyse(cube: xr.Dataset) -> dict[str, xr.Dataset]:
        results = {"decomposition": decomposition(cube), "strategy_curves": strategy_curves(cube)}
        return compute_together(results)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "analyse", analyse)
        patch.setattr(write, "draw_figures", lambda *_, **__: [])
        write.write_report(out)


def _influence(out: str) -> None:
    compute_influence(out, ["mean"], strategy="shuffle", seed=1)


def _retrain(out: str) -> None:
    request = RetrainRequest(removals=("random:2",), targets=("mean",), runs=("shuffle:1",))
    run_here(prepare_retrain(Folder.of(out), request))


def _compare_subsets(out: str) -> None:
    request = SubsetRequest(rules=("tau-high",), sizes=(0.5,), seeds=(1,), runs=("shuffle:1",))
    run_here(prepare_subsets(Folder.of(out), request))


def _explore(out: str) -> None:
    damaged = write_explorer(out).damaged
    if damaged:
        raise RecordError("values that can be read", damaged[0], out, "run the command again")


class Scene(NamedTuple):
    """A command, and what is done before it without a fault."""

    prepare: Callable[[str], Any]
    command: Callable[[str], Any]
    stride: int = 1
    """Of the operations that are tried, every so many-th: the longer a command takes, the fewer."""


SCENES = {
    "data sets": Scene(_nothing, _begin),
    "training": Scene(_begin, _train),
    "continued training": Scene(_interrupt, _train),
    "sorted training": Scene(_train, _train_sorted),
    "withdrawal": Scene(_damage, _withdraw, 2),
    "verification": Scene(_train, _verify),
    "influence": Scene(_train, _influence),
    "consolidation": Scene(_train, consolidate, 5),
    "report": Scene(_train, _report, 11),
    "retraining": Scene(_train, _retrain, 40),
    "subsets": Scene(_train, _compare_subsets, 120),
    "explorer": Scene(_train, _explore, 40),
}


def outcome(out: str) -> Any:
    """Return what must not depend on faults, and assert that no file of a record is damaged."""
    folder = Folder.of(out)
    records = {
        f"{kind}/{name}": commit
        for kind in ("trials", INFLUENCE_FOLDER)
        for name, commit in read_commits(folder, kind).items()
    }
    for name in records:
        for path, digest in (read_commit(folder / name) or {})["files"].items():
            content = (folder / name).read_bytes(path)
            assert content is not None, f"{name}/{path} is missing"
            assert hashlib.sha256(content).hexdigest() == digest, f"{name}/{path} is damaged"
    stored = [
        f"{place}/{path}"
        for place in ("datasets", "consolidated", "analysis")
        for path in (folder / place).walk()
    ]
    return (
        values_of(out) if "trials" in folder.folders() else None,
        {name: (commit["digests"], commit["curves"]) for name, commit in records.items()},
        [path for path in (folder / "trials").walk() if "/withdrawn/" in path],
        {path: hashlib.sha256(_neutral(folder, path)).hexdigest() for path in stored},
    )


def _neutral(folder: Folder, path: str) -> bytes:
    """Return the content of a file without the name of the study."""
    content = folder.read_bytes(path) or b""
    is_text = path.endswith((".json", ".html"))
    return content.replace(str(folder).encode(), b"OUT") if is_text else content


def problem_of(
    scene: Scene,
    out: str,
    fault: contextlib.AbstractContextManager[Any],
    expected: Any,
    must_fail: Callable[[], bool] = lambda: False,
) -> str:
    """Run a scene's command with a fault, then without; return what is wrong.

    Parameters
    ----------
    scene, out
        The scene, and its store.
    fault
        A context in which an operation fails.
    expected
        The outcome without a fault.
    must_fail
        Whether the fault may not pass for a success.
    """
    gc.collect()  # a report leaves 20 MB in cycles of few objects, which are not collected for long
    gc.freeze()  # so that the next collection visits new objects only
    message = ""
    with warnings.catch_warnings():
        warnings.simplefilter("error", DamageWarning)
        # Zarr leaves coroutines behind whose neighbours failed.
        warnings.filterwarnings("ignore", "coroutine .* was never awaited")
        try:
            with fault:
                scene.command(out)
        except UserError as error:
            message = str(error)
        except Exception as error:
            return f"no message, but {error!r}"
        if not message and must_fail():
            return "it passed for a success"
        try:
            scene.command(out)
            found = outcome(out)
        except Exception as error:
            return f"the same command again: {error!r}"
    if found == expected:
        return ""
    parts = zip(("values", "records", "withdrawn", "files"), found, expected, strict=True)
    return f"other {', '.join(name for name, one, other in parts if one != other)}"
