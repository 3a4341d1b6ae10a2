"""Studies of made values for tests of the explorer, and a reader of its parts without its code.

Map: `make_study`, `commit_trial` and `commit_influence` (made values), `damage_chunk`; `write`, and
`Written` (what was written, decoded by NumPy).
"""

import base64
import json
import re
from pathlib import Path

import influence_made
import numpy as np
import oracles

from sampimp.analysis.explorer import write_explorer
from sampimp.schema import CURVES, EpochRecord
from sampimp.store.plan import read_commits
from sampimp.store.record import TrialRecord

GRID = {"shuffle": (1, 2), "rand": (1, 2)}


def make_study(out, *, source=None, grid=GRID, commit=("shuffle-seed1", "rand-seed1"), **changes):
    """Write a study, with values of the named runs; return its folder, plan and source."""
    source = source or oracles.make_source(samples=40)
    plan = oracles.make_plan(
        {"one": source}, grid, **({"epochs": 4, "parameters_every": 0} | changes)
    )
    folder = oracles.start_study(out, plan, {"one": source})
    for name in commit:
        commit_trial(folder, plan, name)
    return folder, plan, source


def commit_trial(folder, plan, name, *, diverged=None):
    """Commit made values of a run, with zeros, an infinity and tiny numbers among them."""
    (planned,) = (
        trial
        for trial in plan.resolve(read_commits(folder))
        if f"{trial.config.strategy}-seed{trial.config.seed}" == name
    )
    layout = plan.layout("one")
    rng = np.random.default_rng(planned.config.seed + 10 * len(planned.config.strategy))
    record = TrialRecord(folder / "trials" / planned.trial_id, oracles.identity_of(planned), layout)
    for epoch in range(1, (diverged or layout.epoch) + 1):
        importance = rng.lognormal(-20, 9, (layout.layer, layout.sample)).astype(np.float32)
        importance[:, 3] = 0
        nll = rng.lognormal(-2, 2, layout.sample).astype(np.float32)
        nll[5] = 0
        if epoch == diverged:
            importance[0, 7], nll[8] = np.inf, np.nan
        arrays = {"importance": importance, "nll": nll, "batch": np.zeros_like(nll)}
        arrays |= {curve: np.float64(epoch == diverged and np.nan) for curve in CURVES}
        record.write(EpochRecord(epoch=epoch, arrays=arrays))
    record.commit(diverged)


def commit_influence(folder, plan, name, targets):
    """Commit influence [epoch, target, layer, sample] of both signs over 25 decades; return it."""
    (run,) = (
        trial
        for trial in plan.resolve(read_commits(folder))
        if f"{trial.config.strategy}-seed{trial.config.seed}" == name
    )
    identity = influence_made.identity_of(run, "influence", targets)
    record, layout = influence_made.begin(folder, plan, run, identity)
    rng = np.random.default_rng(len(targets))
    shape = layout.shape("influence")
    values = (rng.choice([-1, 1], shape) * 10 ** rng.uniform(-20, 5, shape)).astype(np.float32)
    values[..., 3] = 0
    values[0, 0, 0, 4:6] = np.inf, -np.inf
    values[1, 0, 1, 6] = np.nan
    for step in influence_made.steps_of(layout):
        step.arrays["influence"] = values[layout.epoch - step.step]
        if "influence_total" in step.arrays:
            step.arrays["influence_total"] = values.sum((0, 2))
        record.write(step)
    record.commit(None, {"growth_epochs": {}})
    return values


def damage_chunk(out, run, variable, epoch):
    """Change a byte in the stored chunk of an epoch."""
    if variable == "influence":
        (record,) = (out / "influence").glob(f"one-{run}-influence-*")
    else:
        (record,) = (out / "trials").glob(f"one-{run}-*")
    chunks = sorted((record / f"record.zarr/{variable}/c/{epoch - 1}").rglob("*"))
    (chunk,) = (path for path in chunks if path.is_file())
    content = bytearray(chunk.read_bytes())
    content[-3] ^= 0xFF
    chunk.write_bytes(content)


class Written:
    """The files of an explorer."""

    def __init__(self, folder):
        self.folder = folder
        self.study = self.part("data/study.js")
        self.node = self.study["nodes"][0]

    def part(self, file):
        text = (self.folder / file).read_text(encoding="ascii")
        return json.loads(re.fullmatch(r"sampimpData\((\{.*\})\);\n", text)[1])

    def run(self, number=0):
        """Return the columns of a run by name, and its entry."""
        entry = self.node["runs"][number]
        part = self.part(entry["file"])
        assert (part["kind"], part["run"]) == ("run", entry["id"])
        assert [column["name"] for column in entry["columns"]] == list(
            dict.fromkeys(column["name"] for column in entry["columns"])
        )
        assert set(part["columns"]) == {column["name"] for column in entry["columns"]}
        return {name: array(text, "<f4") for name, text in part["columns"].items()}, entry

    def history(self, number=0):
        """Return the values of a history [row, epoch, sample], and its entry."""
        entry = self.node["histories"][number]
        codes, low, high = self._codes(entry, {"kind": "history"})
        values = np.exp(low + (codes - 2) / 65532 * (high - low))
        values[codes == 0], values[codes == 1], values[codes == 65535] = np.nan, 0, np.inf
        return values, entry

    def influence(self, number=0):
        """Return the influence of a run on a target [layer, epoch, sample], and its entry."""
        entry = self.node["influence"][number]
        identity = {"kind": "influence", "run": entry["run"], "target": entry["target"]}
        codes, low, high = self._codes(entry, identity)
        negative = codes < 32768
        magnitude = np.exp(low + (codes - np.where(negative, 2, 32768)) / 32765 * (high - low))
        values = np.where(negative, -magnitude, magnitude)
        values[codes == 0], values[codes == 1] = np.nan, 0
        values[codes == 65534], values[codes == 65535] = -np.inf, np.inf
        return values, entry

    def _codes(self, entry, identity):
        """Return the codes [row, epoch, sample] of all pages, and the logs of each row's limits."""
        pages = []
        for page, file in enumerate(entry["files"]):
            part = self.part(file)
            assert part.items() >= (identity | {"page": page}).items()
            codes = array(part["array"], "<u2")
            pages.append(codes.reshape(len(entry["rows"]), len(entry["epochs"]), -1))
        low, high = (
            np.array([row[name] for row in entry["rows"]])[:, None, None]
            for name in ("low", "high")
        )
        return np.concatenate(pages, axis=-1).astype(np.float64), low, high

    def files(self):
        """Return the modification time and the bytes of each file."""
        return {
            path.relative_to(self.folder).as_posix(): (path.stat().st_mtime_ns, path.read_bytes())
            for path in sorted(self.folder.rglob("*"))
            if path.is_file()
        }


def array(text, dtype):
    return np.frombuffer(base64.b64decode(text, validate=True), dtype)


def write(out, **options):
    """Write the explorer of a study; return its files, and what the call returned."""
    made = write_explorer(str(out), **options)
    return Written(Path(str(made.folder))), made
