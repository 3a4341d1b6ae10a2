"""Read every byte of a study and compare it with its digest; withdraw what is damaged.

A study has parts: trials, records of influence, data sets, analyses and more. Each has a list of
its files (`sampimp.store.manifests`), and is verified file by file, by several threads. Parts that
an earlier version wrote have no such list; their values are compared with their digests instead.
Nothing is written into the study.

A trial that is withdrawn counts as missing, so that the command that trained the study trains it
again.

Map: `verify_study`, `withdraw_damaged`; `StudyPart`, `list_parts`, `Findings`; `study_root`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import Progress

from sampimp.errors import RecordError, printable
from sampimp.schema import digest_json
from sampimp.store.commits import COMMIT, read_commit, remove_damaged_commit, withdraw
from sampimp.store.datasets import open_source, read_source, require_planned_shape
from sampimp.store.influence_layouts import INFLUENCE_FOLDER, layout_of
from sampimp.store.integrity import find_damage
from sampimp.store.location import Folder
from sampimp.store.manifests import (
    FileList,
    file_damage,
    read_manifest_of,
    remove_manifest,
    strays,
)
from sampimp.store.plan import Plan
from sampimp.store.plan_files import PLAN_COPY, PLANS, find_plan
from sampimp.store.score_files import damaged_scores, has_scores
from sampimp.store.seals import json_bytes, unseal
from sampimp.store.snapshots import SNAPSHOTS, stored_snapshots


class Kind(NamedTuple):
    """A kind of part, and what repairs it."""

    plural: str
    repair: str
    withdrawn: bool = False
    """Whether `--withdraw` takes a damaged part out of the study, so that it is made again."""


PART_KINDS: Mapping[str, Kind] = {
    "trial": Kind(
        "committed trials", "the command that trained the study trains them again", withdrawn=True
    ),
    "record": Kind(
        "records of influence, retraining and subsets",
        "the command that computed them computes them again",
        withdrawn=True,
    ),
    "snapshots": Kind(
        "snapshots of trials", "`sampimp score OUT` computes them again", withdrawn=True
    ),
    "data set": Kind(
        "data sets", "the command that trained the study stores it again", withdrawn=True
    ),
    "scores": Kind("files of scores", "run `sampimp subset OUT` with the same scores again"),
    "plan": Kind("plan", "the next run of the study's command sets damaged ones aside"),
    "analysis": Kind("analyses", "run `sampimp report OUT` again"),
    "indices": Kind("folders of selected samples", "run `sampimp subset OUT` again"),
    "consolidated": Kind("consolidated stores", "run `sampimp consolidate OUT` again"),
}


KINDS_WITH_LISTS = ("trial", "record", "snapshots", "data set")
"""Kinds whose parts have no list of their files if an earlier version wrote them."""


class StudyPart(NamedTuple):
    """A part of a study that is verified at a time."""

    kind: str
    """A key of `PART_KINDS`."""
    name: str
    """Its folder, relative to the study's."""
    files: FileList | None
    """Its files; None if it has no list of them."""
    check: Callable[[], Iterable[str]]
    """Yields further damage, without reading the files of the list."""

    @property
    def label(self) -> str:
        """The name that is shown."""
        name = self.name.rpartition("/")[2]
        if self.kind == "plan":
            return "the plan"
        if self.kind == "data set":
            return f"data set {name.removesuffix('.zarr')}"
        return name if self.kind in ("trial", "record") else self.name


@dataclass
class Findings:
    """The result of a verification."""

    damaged: list[tuple[StudyPart, list[str]]] = field(default_factory=list)
    """The damaged parts, and what is wrong with each."""
    root: str | None = None
    """The root of the study; None if a part of it is damaged."""

    def of(self, *kinds: str) -> list[str]:
        """Return the names of the damaged parts of some kinds."""
        return [part.name for part, _ in self.damaged if part.kind in kinds]


def verify_study(
    folder: Folder,
    plan: Plan,
    console: Console,
    *,
    workers: int = 4,
    done_file: Path | None = None,
) -> Findings:
    """Read every file of a study, and print what is damaged.

    Parameters
    ----------
    folder, plan
        The study.
    console
        Where progress and results are printed.
    workers
        Number of files that are read at a time.
    done_file
        A file, outside of the study, with the digests of the lists that were verified before; they
        are not read again, and those that are found right now are added.
    """
    parts = list_parts(folder, plan)
    findings, done = Findings(), _read_done(done_file)
    total = sum(len(part.files.files) for part in parts if part.files)
    with ThreadPoolExecutor(workers) as pool, Progress(console=console, transient=True) as progress:
        task = progress.add_task("Verifying", total=total)
        for part in parts:
            damage = list(part.check())
            if part.files is not None:
                if part.files.digest not in done:
                    results = pool.map(
                        lambda p, of=part.files: file_damage(of, p), part.files.files
                    )
                    damage += filter(None, results)
                progress.advance(task, len(part.files.files))
            if damage:
                findings.damaged.append((part, damage))
            elif part.files and done_file and part.files.digest not in done:
                with done_file.open("a") as file:
                    file.write(f"{part.files.digest} {part.name}\n")
    _print_findings(parts, findings, console)
    if not findings.of("trial", "data set"):
        findings.root = study_root(plan, parts)
        console.print(f"root of the study: {findings.root}", highlight=False)
    return findings


def study_root(plan: Plan, parts: Sequence[StudyPart]) -> str:
    """Return one digest of the plan, the data sets and the committed trials, all of their bytes."""
    lists = [
        (part.name, part.files.digest if part.files else "")
        for part in parts
        if part.kind in ("trial", "data set")
    ]
    return digest_json([plan.to_json(), sorted(lists)])


def list_parts(folder: Folder, plan: Plan) -> list[StudyPart]:
    """Return the parts of a study that are complete."""
    parts = [
        *_records(folder, plan, "trials", "trial"),
        *_records(folder, plan, INFLUENCE_FOLDER, "record"),
        *_snapshots(folder, plan),
    ]
    committed = any(part.kind == "trial" for part in parts)
    for key in plan.datasets:
        parts.append(_dataset(folder, plan, key, committed))
    if has_scores(folder):
        parts.append(StudyPart("scores", INFLUENCE_FOLDER, None, partial(damaged_scores, folder)))
    parts.append(StudyPart("plan", PLANS, None, partial(_check_plans, folder)))
    parts += _folder(folder, "analysis", "analysis")
    parts += _folder(folder, f"{INFLUENCE_FOLDER}/selected", "indices")
    for name in (folder / "consolidated").folders():
        parts += _folder(folder, f"consolidated/{name}", "consolidated")
    return parts


def _records(folder: Folder, plan: Plan, place: str, kind: str) -> list[StudyPart]:
    """Return the committed records in a folder, and those whose commit is damaged."""

    def read(name: str) -> StudyPart | None:
        record = folder / place / name
        content = record.read_bytes(COMMIT)
        if content is None:
            return None
        try:
            commit = read_commit(record) or {}
        except RecordError as error:
            return StudyPart(kind, f"{place}/{name}", None, _says(error))
        if "files" in commit:
            seal = sha256(content).hexdigest()
            files = FileList(f"{place}/{name}", record, commit["files"], seal)
            return StudyPart(kind, f"{place}/{name}", files, tuple)

        def check_values() -> Iterator[str]:
            if commit.get("dataset") not in plan.datasets:
                yield f"{COMMIT} is of a data set that is not in the plan"
                return
            layout = plan.layout(commit["dataset"])
            whole = layout_of(commit, layout) if "kind" in commit else layout
            yield from find_damage(record, commit, whole)

        return StudyPart(kind, f"{place}/{name}", None, check_values)

    with ThreadPoolExecutor(16) as pool:  # an object store answers in tens of milliseconds
        return [part for part in pool.map(read, (folder / place).folders()) if part]


def _snapshots(folder: Folder, plan: Plan) -> Iterator[StudyPart]:
    """Yield the snapshots of each trial that has some."""
    try:
        scored = folder.read_json(SNAPSHOTS) or {}
    except RecordError as error:
        yield StudyPart("snapshots", SNAPSHOTS, None, _says(error))
        return
    if scored and folder.read_bytes(SNAPSHOTS) != json_bytes(scored):
        yield StudyPart("snapshots", SNAPSHOTS, None, lambda: ["other bytes than were written"])
    datasets = {
        name: commit["dataset"]
        for name in scored
        if (commit := _commit_or_none(folder / "trials" / name))
        and commit.get("dataset") in plan.datasets
    }
    for name, epochs in scored.items():
        place = f"trials/{name}/snapshots.zarr"
        files, wrong = _files_of(folder, place)

        def check_values(
            name: str = name, epochs: Mapping = epochs, wrong: list[str] = wrong
        ) -> Iterator[str]:
            yield from wrong
            if name not in datasets:
                yield f"{SNAPSHOTS} names a trial of the plan's data sets that is not committed"
                return
            layout = plan.layout(datasets[name])
            yield from stored_snapshots(folder / "trials" / name, layout, epochs).damage()

        yield StudyPart("snapshots", place, files, check_values)


def _dataset(folder: Folder, plan: Plan, key: str, committed: bool) -> StudyPart:
    """Return a data set of the plan; once trials are committed, it may not be missing."""
    place, info = f"datasets/{key}.zarr", plan.datasets[key]
    files, wrong = _files_of(folder, place)

    def check() -> Iterator[str]:
        yield from wrong
        try:
            stored = open_source(folder / place, info.digest, info.chunks)
            if stored is None:
                yield from ["it is missing, or not complete"] if committed else []
                return
            require_planned_shape(stored, info.sample_count, info.test_count, info.input_shape)
            if files is None:
                yield from stored.damage()
                if not stored.is_verifiable:
                    read_source(folder / place)
        except RecordError as error:
            yield f"{error.summary}, {error.where}"

    return StudyPart("data set", place, files, check)


def _check_plans(folder: Folder) -> Iterator[str]:
    """Yield the plans that are damaged, and a copy of the newest that is none."""
    for name in (folder / PLANS).files():
        try:
            unseal((folder / PLANS).read_bytes(name) or b"", name)
        except RecordError as error:
            yield f"{name}: {error.got}"
    newest = find_plan(folder)
    if newest.file.startswith(PLANS) and folder.read_bytes(PLAN_COPY) != newest.content:
        yield f"{PLAN_COPY} is no copy of {newest.file}"


def _folder(folder: Folder, name: str, kind: str) -> Iterator[StudyPart]:
    """Yield a folder that has a list of its files."""
    files, wrong = _files_of(folder, name)
    if files is not None or wrong:
        yield StudyPart(kind, name, files, lambda: wrong)


def _files_of(folder: Folder, name: str) -> tuple[FileList | None, list[str]]:
    """Return the files of a folder, and what is wrong with their list."""
    try:
        return read_manifest_of(folder, name), []
    except RecordError as error:
        return None, [f"{error.summary}, {error.where}"]


def _commit_or_none(record: Folder) -> Mapping | None:
    with suppress(RecordError):
        return read_commit(record)
    return None


def _says(error: RecordError) -> Callable[[], list[str]]:
    return lambda: [f"{error.summary}, {error.where}"]


def _read_done(done_file: Path | None) -> set[str]:
    if done_file is None or not done_file.exists():
        return set()
    return {line.partition(" ")[0] for line in done_file.read_text().splitlines()}


def _result(damaged: int, older: int) -> str:
    """Return in words how many parts of a kind are damaged, and how many have no list of files."""
    words = f"{damaged} damaged" if damaged else "every byte is as it was written"
    if not older:
        return words
    words = words if damaged else "every value is as it was written"
    return f"{words}; {older} of an earlier version, whose curves and other files have no digests"


def _print_findings(parts: Sequence[StudyPart], findings: Findings, console: Console) -> None:
    for part, damage in findings.damaged:
        words = printable(f"{part.label} is damaged: {damage[0]}")
        console.print(words, style="bold", markup=False, highlight=False)
        if damage[1:]:
            words = printable(f"  and {len(damage) - 1} more places, to {damage[-1]}")
            console.print(words, markup=False, highlight=False)
    console.print("Verified:")
    width = max(len(PART_KINDS[part.kind].plural) for part in parts)
    for kind, (plural, _, _) in PART_KINDS.items():
        same = [part for part in parts if part.kind == kind]
        if same:
            older = sum(part.files is None for part in same) if kind in KINDS_WITH_LISTS else 0
            result = _result(len(findings.of(kind)), older)
            count = "" if kind in ("plan", "scores") else len(same)
            console.print(f"  {plural:<{width}}  {count:>5}  {result}", highlight=False)
    damaged_names = {part.name for part, _ in findings.damaged}
    unlisted = [
        f"{part.name}/{path}"
        for part in parts
        if part.files is not None and part.name not in damaged_names
        for path in strays(part.files)
        if path != COMMIT and not path.startswith("snapshots.zarr")
    ]
    if unlisted:
        more = f" and {len(unlisted) - 1} more" if unlisted[1:] else ""
        words = f"files of no part, which are not read: {unlisted[0]}{more}"
        console.print(printable(words), markup=False, highlight=False)


def withdraw_damaged(folder: Folder, findings: Findings, console: Console) -> None:
    """Take damaged parts out of a study, as far as they are made again."""
    for part, _ in findings.damaged:
        if part.kind in ("trial", "record"):
            record = folder / part.name
            remove_damaged_commit(record)
            if record.read_bytes(COMMIT) is not None:
                withdraw(record)
        elif part.kind in ("data set", "snapshots"):
            remove_manifest(folder, part.name)
            (folder / part.name).remove()
    if SNAPSHOTS in findings.of("snapshots"):
        folder.delete(SNAPSHOTS)
    elif scored := folder.read_json(SNAPSHOTS):
        gone = [name.split("/")[1] for name in findings.of("trial", "snapshots")]
        left = {name: entry for name, entry in scored.items() if name not in gone}
        folder.write_json(SNAPSHOTS, left)
    for kind, (plural, repair, withdrawn) in PART_KINDS.items():
        count = len(findings.of(kind))
        if count and withdrawn:
            console.print(f"{count} {plural} withdrawn: {repair}.", highlight=False)
        elif count:
            console.print(f"{count} {plural} not withdrawn: {repair}.", highlight=False)
