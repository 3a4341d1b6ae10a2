"""The types of a study's JSON files: which entries their readers rely on.

`Folder.read_json` compares every file with its type before it returns any value, so that a file of
somebody else, or a damaged one, is a `RecordError` and never a KeyError somewhere else. The plan's
type is the dataclass that is made from it (`sampimp.store.plan`).

Map: `check_file` (by the file's name); `HistoryFile`, `CommitFile` and the types of other files;
`SourceAttrs` (attributes of a data set); `RECORD_NAME`, `KEY`, `FOLDER_NAME`, `LARGEST_COUNT`
(limits of texts and numbers).
"""

import re
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal, NotRequired, TypedDict

from sampimp.errors import RecordError
from sampimp.schema import SUBSET_BUDGETS
from sampimp.store.json_types import require_type

LARGEST_COUNT = 2**28
"""Largest number of samples, epochs or other positions that a file may claim (arbitrary): labels
and positions of so many samples take 4 GiB. ImageNet-21k has 2^24 samples."""

KEY = re.compile(r"[A-Za-z0-9_-]{1,200}")
"""Key of a data set: a folder's name and the start of others, so never a path."""

RECORD_NAME = re.compile(r"record(-\d{1,9})?\.zarr|snapshots\.zarr")
"""Name of a record's folder in that of its trial."""

FOLDER_NAME = re.compile(r"[^/\x00]{0,254}[^/\x00.]")
"""Name of a folder, and never a path."""

RELATIVE_PATH = re.compile(r"(?!(.*/)?\.\.?(/|$))[^/\x00]+(/[^/\x00]+)*")
"""Path of a file within a folder, without steps upward."""

Count = Annotated[int, range(1, LARGEST_COUNT)]
Seconds = Annotated[float, (-1e12, 1e12)]
Time = Annotated[float, (0.0, 2.5e11)]
"""Seconds since 1970, up to the year 9892: `datetime` ends in 9999."""
Name = Annotated[str, re.compile(r"[^\x00]{0,1000}")]
Share = Annotated[float, (1 / LARGEST_COUNT, 1.0)]
"""Share of the samples, at least one of them."""
FolderName = Annotated[str, FOLDER_NAME]


class HistoryFile(TypedDict):
    """Entries of `sampimp.store.record.History` in a commit and in a checkpoint."""

    parts: list[tuple[int, Annotated[str, RECORD_NAME]]]
    digests: dict[str, list[list[str]]]
    curves: dict[str, list[float | list[float]]]
    files: NotRequired[dict[Annotated[str, RELATIVE_PATH], str]]


class _CheckpointHistory(HistoryFile):
    seconds: list[Seconds]


class CommitFile(HistoryFile):
    """COMMIT.json of a trial."""

    dataset: NotRequired[str]
    fingerprint: str
    attempt: int
    epochs: int
    diverged_epoch: Count | None
    seconds: NotRequired[list[Seconds]]


class ManifestFile(TypedDict):
    """MANIFEST.json of a checkpoint."""

    fingerprint: str
    epoch: int
    sha256: str
    time: Time
    history: _CheckpointHistory


class AttemptFile(TypedDict):
    """attempts/NNNN.json."""

    host: str
    time: Time


class FailureFile(TypedDict):
    """errors/NNNN.json."""

    time: Time
    error: str


class _Identity(TypedDict):
    """What identifies a record of influence, retraining or subsets."""

    kind: str
    dataset: str
    strategy: str
    seed: int
    trial: FolderName
    record: str
    code: str
    fingerprint: str


class _TargetsIdentity(_Identity):
    targets: list[str]
    units: list[str]
    functions: NotRequired[dict[str, str]]


class _InfluenceIdentity(_TargetsIdentity):
    smoothing: dict[str, float]


class _FixedPointIdentity(_TargetsIdentity):
    curvatures: list[str]
    dampings: list[float]
    default_damping: float
    krylov_steps: int


class _RetrainIdentity(_TargetsIdentity):
    removals: list[str]
    repeats: Count
    jitter: float
    renormalised: bool
    denominator: str


class _SearchIdentity(_Identity):
    judged_on: Literal["validation", "test"]
    count: int
    rounds: Count


class _SubsetIdentity(_Identity):
    judged_on: Literal["validation", "test"]
    judges: int
    rule: Name
    variants: list[Name]
    size: Share
    count: int
    budgets: list[Literal[SUBSET_BUDGETS]]  # type: ignore[valid-type]
    seeds: list[int]
    scores: str | None
    search: FolderName | None


class _SubsetOutcome(TypedDict):
    time: Time


class _InfluenceOutcome(TypedDict):
    growth_epochs: dict[str, int]


_IDENTITIES: Mapping[str, Any] = {
    "states": _Identity,
    "influence": _InfluenceIdentity,
    "probes": _InfluenceIdentity,
    "fixed-point": _FixedPointIdentity,
    "retrain": _RetrainIdentity,
    "search": _SearchIdentity,
    "subset": _SubsetIdentity,
}
_OUTCOMES: Mapping[str, Any] = {
    "influence": _InfluenceOutcome,
    "probes": _InfluenceOutcome,
    "subset": _SubsetOutcome,
}


class _Kind(TypedDict):
    kind: NotRequired[Literal[tuple(_IDENTITIES)]]  # type: ignore[valid-type]


class _DerivedKind(TypedDict):
    """Of a record in OUT/influence."""

    kind: Literal[tuple(_IDENTITIES)]  # type: ignore[valid-type]


class _ZarrFile(TypedDict):
    attributes: NotRequired[dict[str, Any]]


class FilesFile(TypedDict):
    """The list of a folder's files."""

    files: dict[Annotated[str, RELATIVE_PATH], str]


_Snapshots = dict[str, list[str]]
"""Digests of the chunks of each epoch."""


class _SummaryFile(TypedDict):
    records: str
    text: str


class _StoredArray(TypedDict):
    shape: list[Count]
    dtype: Literal["|u1", "<f4", "<i8"]
    rows: Count
    digests: list[str]


class ChunkTable(TypedDict):
    """As `sampimp.store.datasets.chunk_table` returns it."""

    full_scale: float
    arrays: dict[str, _StoredArray]


class SourceAttrs(TypedDict):
    """The attributes of a complete data set."""

    name: str
    class_names: list[str]
    digest: str
    chunks: NotRequired[ChunkTable]
    image_size: NotRequired[Count]
    files: NotRequired[dict[str, _StoredArray]]


_FILES: tuple[tuple[re.Pattern[str], Any], ...] = (
    (re.compile(r"(.*/)?COMMIT\.json"), CommitFile),
    (re.compile(r"(.*/)?MANIFEST\.json"), ManifestFile),
    (re.compile(r"(.*/)?attempts/[^/]*\.json"), AttemptFile),
    (re.compile(r"(.*/)?errors/[^/]*\.json"), FailureFile),
    (re.compile(r"(.*/)?snapshots\.json"), dict[Annotated[str, FOLDER_NAME], _Snapshots]),
    (re.compile(r"(.*/)?zarr\.json"), _ZarrFile),
    (re.compile(r"(.*/)?analysis/summary\.json"), _SummaryFile),
    (re.compile(r"(.*/)?(trial|study)\.json"), dict[str, Any]),
)


_DERIVED = re.compile(r"(.*/)?influence/[^/]+/[^/]+")

LARGEST_PLAN = 2**24
"""Largest number of epochs of all trials together: each of the curves takes 8 bytes of it. 10,000
trials of 1,000 epochs have 10^7."""

LARGEST_EPOCHS = 2**20
"""Largest number of epochs of a trial: a cube that is opened takes 400 bytes of it."""

LARGEST_TEXTS = 2**26
"""Largest number of characters of a list of names, each counted as the longest one: NumPy keeps
texts of one width, in 4 bytes a character."""


def is_coordinate(names: Collection[str]) -> bool:
    """Return whether names can be a coordinate: not too long, and none with NUL.

    NumPy drops a NUL at the end of a text.
    """
    size = len(names) * max(map(len, names), default=0)
    return size <= LARGEST_TEXTS and not any("\x00" in name for name in names)


def check_plan_sizes(plan: Mapping[str, Any], where: str) -> None:
    """Raise RecordError for a plan with nothing in it, or with more than a study can have.

    Parameters
    ----------
    plan
        The content of study.json, with the types of a plan.
    where
        The file.
    """
    seeds = [seed for each in plan["grid"].values() for seed in each]
    cells = len(plan["grid"]) * len(set(seeds)) * len(plan["datasets"])
    epochs = plan["training"]["epochs"]
    layers = [info["layers"] for info in plan["datasets"].values()]
    wrong = {
        "no data set, strategy or seed": not cells,
        "the same seed twice": any(len(each) > len(set(each)) for each in plan["grid"].values()),
        "a network without parameters": not all(layers),
        f"{cells:,} trials of {epochs:,} epochs": cells * (epochs + 1) > LARGEST_PLAN
        or epochs > LARGEST_EPOCHS,
        "names of layers that are too long, or have a NUL": not all(
            is_coordinate([name for name, _ in each]) for each in layers
        ),
        f"more than {LARGEST_PARAMETERS:,} parameters": any(
            sum(size for _, size in each) > LARGEST_PARAMETERS for each in layers
        ),
        "an order of other layers": any(
            sorted(info.get("forward_order") or names) != sorted(names)
            for info in plan["datasets"].values()
            for names in [{name for name, _ in info["layers"]}]
        ),
    }
    if any(wrong.values()):
        raise RecordError(
            expected=f"a plan of at least one trial, and of at most {LARGEST_PLAN:,} epochs, "
            f"{LARGEST_EPOCHS:,} of each",
            got=", ".join(words for words, holds in wrong.items() if holds),
            where=where,
            todo="restore study.json from a copy, or choose another folder",
        )


LARGEST_PARAMETERS = 2**32
"""Largest number of parameters that a plan may claim (arbitrary)."""


def check_file(value: Any, path: str, where: str) -> None:
    """Raise RecordError unless the content of a JSON file has the type of such files.

    Parameters
    ----------
    value
        Its content.
    path
        Its path in the study's folder, or the end of that.
    where
        The same in full, for the message.
    """
    for pattern, hint in _FILES:
        if pattern.fullmatch(path):
            require_type(value, hint, where)
            break
    if not path.endswith(("COMMIT.json", "trial.json")):
        return
    require_type(value, _DerivedKind if _DERIVED.fullmatch(path) else _Kind, where)
    kind = value.get("kind")
    if kind is None:  # of a training run
        return
    require_type(value, _IDENTITIES[kind], where)
    if path.endswith("COMMIT.json") and kind in _OUTCOMES:
        require_type(value, _OUTCOMES[kind], where)
