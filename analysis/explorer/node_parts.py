"""The parts of one node: labels, images or values, columns of each run, histories and influence.

Map: `NodeParts` (`write`), `measure_node` (what the size of a node follows from).
"""

import base64
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypedDict

import numpy as np

from sampimp.analysis.explorer.explored_study import ExploredNode, ExploredRun, safe_name
from sampimp.analysis.explorer.explorer_folder import ExplorerFolder, encode_array, script
from sampimp.analysis.explorer.histories import PAGE, read_history, read_influence
from sampimp.analysis.explorer.run_columns import (
    Columns,
    as_json,
    count_derived,
    derived_columns,
    seed_spread,
    targets_of_run,
    trained_columns,
)
from sampimp.analysis.explorer.sprites import PAGE_SAMPLES, PER_ROW, SpriteSheet
from sampimp.analysis.explorer.thinning import MOST_TARGETS, NodeSize, Thinning
from sampimp.errors import RecordError
from sampimp.store.datasets import open_source
from sampimp.store.json_types import require_type

MOST_LAYERS = 12
"""Layers up to which every run has columns of them; with more, only the first run (arbitrary)."""
MOST_VALUES = 100
"""Values of a sample that are shown, of a data set without images (arbitrary)."""
_NO_CLASS = 65535
_DAMAGED_GREY = 128


class _RunEntry(TypedDict):
    """The entry of a run in the manifest."""

    id: str
    strategy: str
    seed: int
    status: Literal["complete", "diverged"]
    diverged_epoch: int | None
    columns: list[dict[str, str]]
    file: str


class _Importance(TypedDict):
    importance: str


class _RunPart(TypedDict):
    columns: _Importance


_Part = tuple[dict[str, Any], bytes]
_Parts = tuple[dict[str, Any], list[bytes]]


class NodeParts:
    """Writes the parts of a node.

    Parameters
    ----------
    node
        The node.
    files
        Where they are written.
    thinning
        What is left out.
    progress
        Called with a few words before each step.
    """

    def __init__(
        self,
        node: ExploredNode,
        files: ExplorerFolder,
        thinning: Thinning,
        progress: Callable[[str], None],
    ) -> None:
        self.node, self.files, self.thinning, self._progress = node, files, thinning, progress
        self.step = thinning.sample_step
        self.samples = -(-node.info.sample_count // self.step)
        self._damage: list[str] = []
        self._tau: dict[str, np.ndarray] = {}

    @property
    def damaged(self) -> list[str]:
        """What could not be read, in words."""
        return list(dict.fromkeys(self._damage))

    def write(self, histories: list[ExploredRun]) -> dict[str, Any]:
        """Write the parts, and return the node's entry in the manifest."""
        node, cube = self.node, self.node.cube
        self._progress(f"{node.name}: samples")
        entry: dict[str, Any] = {
            "name": node.name,
            "samples": node.info.sample_count,
            "sample_ids": self._write_positions(),
            "planned": len(node.planned),
            "committed": len(node.runs),
            "diverged": sum(run.diverged_epoch is not None for run in node.runs),
            "classes": [str(name) for name in node.info.class_names],
            "labels": self._write_labels(),
            "layers": [str(layer) for layer in cube["layer"].values],
            "epochs": cube.sizes["epoch"],
            "units": {
                name: str(cube[name].attrs.get("units", "")) for name in ("importance", "nll")
            },
            "names": self._write_names(),
            "rows": self._write_rows(),
            "sprites": self._write_sprites(),
        }
        entry["runs"] = [self._write_run(place, run) for place, run in enumerate(node.runs)]
        entry["shared"] = self._write_shared(entry["runs"])
        entry["histories"] = [self._write_history(run) for run in histories]
        entry["influence"] = [
            self._write_influence(run, target)
            for run in histories
            for target in targets_of_run(node, run)[: self.thinning.targets]
        ]
        return entry

    def notes(self) -> list[str]:
        """Return what is not shown of the node, in sentences."""
        lines = []
        targets = max((len(targets_of_run(self.node, run)) for run in self.node.runs), default=0)
        if targets > MOST_TARGETS:
            lines.append(
                f"{self.node.name}: the influence on the first {MOST_TARGETS} of {targets} targets "
                "is shown."
            )
        values = math.prod(self.node.info.input_shape)
        if "image" not in self.node.cube and values > MOST_VALUES:
            lines.append(
                f"{self.node.name}: the first {MOST_VALUES} of {values:,} values of each sample "
                "are shown."
            )
        return lines

    def _add(
        self,
        name: str,
        basis: Any,
        make: Callable[[list[str]], Any],
        ending: str = "js",
        hint: Any = dict[str, Any],
    ) -> dict[str, Any]:
        path = f"{self.node.folder}/{name}"
        return self.files.add(path, ending, [basis, self.step], make, self._damage, hint)

    def _script(self, kind: str, **more: Any) -> bytes:
        return script({"kind": kind, "node": self.node.name, **more})

    # Samples.

    def _write_positions(self) -> dict[str, Any] | None:
        if self.step == 1:
            return None
        count = self.node.info.sample_count
        positions = np.arange(0, count, self.step, dtype=np.int32)
        content = self._script("sample_ids", array=encode_array(positions))
        return self._add("ids", count, lambda _: ({}, content))

    def _write_labels(self) -> dict[str, Any]:
        labels = np.full(self.samples, _NO_CLASS, np.uint16)
        if "label" in self.node.cube.coords:
            stored = self.node.cube["label"].values[:: self.step]
            known = (stored >= 0) & (stored < _NO_CLASS)
            labels[known] = stored[known]
        encoded = encode_array(labels)
        content = self._script("labels", array=encoded)
        return self._add("labels", encoded, lambda _: ({}, content))

    def _write_names(self) -> dict[str, Any] | None:
        if "file" not in self.node.cube.coords:
            return None
        names = self.node.cube["file"].values[:: self.step].tolist()
        content = self._script("names", values=names)
        return self._add("names", names, lambda _: ({}, content))

    def _write_rows(self) -> dict[str, Any] | None:
        if "image" in self.node.cube or not self.node.runs:
            return None

        def make(damage: list[str]) -> _Parts:
            pages = [
                self._script("rows", page=page, values=values)
                for page, values in enumerate(read_rows(self.node, self.step, damage))
            ]
            return {"page": PAGE, "columns": None}, pages

        return self._add("rows", [self.node.info.digest, MOST_VALUES], make)

    def _write_sprites(self) -> dict[str, Any] | None:
        if "image" not in self.node.cube:
            return None
        sheet = sheet_of(self.node)

        def make(damage: list[str]) -> _Parts:
            pages = read_pages(self.node, self.step, damage)
            height, width = sheet.cell
            described = {
                "width": width,
                "height": height,
                "per_row": PER_ROW,
                "page": PAGE_SAMPLES,
                "pixelated": sheet.is_small,
            }
            return described, [sheet.encode(images) for images in pages]

        basis = [self.node.info.digest, vars(sheet)]
        return self._add("sprites", basis, make, sheet.ending)

    # Runs.

    def _write_run(self, place: int, run: ExploredRun) -> dict[str, Any]:
        by_layer = place == 0 or self.node.cube.sizes["layer"] <= MOST_LAYERS
        self._progress(f"{self.node.name}: {run.name}, {place + 1} of {len(self.node.runs)} runs")

        def make(damage: list[str]) -> _Part:
            columns = trained_columns(self.node, run, self.step, by_layer=by_layer, damage=damage)
            columns |= derived_columns(self.node, run, self.step, damage)
            encoded = {column.name: encode_array(values) for column, values in columns.items()}
            self._tau[run.name] = next(iter(columns.values()))
            described = {
                "id": run.name,
                "strategy": run.strategy,
                "seed": run.seed,
                "status": "complete" if run.diverged_epoch is None else "diverged",
                "diverged_epoch": run.diverged_epoch,
                "columns": as_json(columns),
            }
            return described, self._script("run", run=run.name, columns=encoded)

        probes = self.node.cube.get("final_importance_total")
        smoothing = None if probes is None else probes.attrs.get("smoothing", "")
        basis = [run.record, run.derived, by_layer, smoothing if run.derived else None]
        return self._add(f"run-{safe_name(run.name)}", basis, make, hint=_RunEntry)

    def _write_shared(self, entries: list[dict[str, Any]]) -> dict[str, Any] | None:
        by_strategy: dict[str, dict[str, str]] = {}
        for entry in entries:
            if entry["status"] == "complete":
                by_strategy.setdefault(entry["strategy"], {})[entry["id"]] = entry["file"]
        several = {name: files for name, files in by_strategy.items() if len(files) > 1}
        if not several:
            return None

        def make(damage: list[str]) -> _Part:
            columns: Columns = {}
            for strategy, files in several.items():
                self._progress(f"{self.node.name}: seeds of {strategy}")
                each = [self._read_tau(run, file, damage) for run, file in files.items()]
                whole = [tau for tau in each if not np.isnan(tau).any()]
                if len(whole) > 1:
                    columns |= seed_spread(strategy, whole)
            encoded = {column.name: encode_array(values) for column, values in columns.items()}
            return {"columns": as_json(columns)}, self._script("shared", columns=encoded)

        return self._add("shared", several, make)

    def _read_tau(self, run: str, file: str, damage: list[str]) -> np.ndarray:
        """Return the overall importance of a run, from memory or from its part; NaN if damaged."""
        if run not in self._tau:
            try:
                part = self.files.read(file)
                require_type(part, _RunPart, file)
                self._tau[run] = decode_column(part["columns"]["importance"])
            except (RecordError, ValueError):
                self._tau[run] = np.empty(0)
            if len(self._tau[run]) != self.samples:
                damage.append(f"{file} of the explorer: damaged; remove it")
                self._tau[run] = np.full(self.samples, np.nan)
        return self._tau[run]

    def _write_history(self, run: ExploredRun) -> dict[str, Any]:
        epochs = self._epochs(run)
        self._progress(f"{self.node.name}: history of {run.name}")

        def make(damage: list[str]) -> _Parts:
            rows, codes = read_history(self.node, run, epochs, self.step, damage)
            described = {"run": run.name, "epochs": epochs, "page": PAGE, "rows": rows}
            return described, self._pages("history", codes, run=run.name)

        return self._add(f"history-{safe_name(run.name)}", [run.record, epochs], make)

    def _write_influence(self, run: ExploredRun, place: int) -> dict[str, Any]:
        target = str(self.node.cube["target"].values[place])
        unit = str(self.node.cube["target_units"].values[place])
        epochs = self._epochs(run)
        self._progress(f"{self.node.name}: influence of {run.name} on {target}")

        def make(damage: list[str]) -> _Parts:
            rows, codes = read_influence(self.node, run, place, epochs, self.step, damage)
            described = {
                "run": run.name,
                "target": target,
                "unit": f"{unit} per unit of sample weight",
                "epochs": epochs,
                "page": PAGE,
                "rows": rows,
            }
            return described, self._pages("influence", codes, run=run.name, target=target)

        name = f"influence-{safe_name(run.name)}-{safe_name(target)}"
        return self._add(name, [run.influence[target], unit, epochs], make)

    def _epochs(self, run: ExploredRun) -> list[int]:
        """Return the epochs that are shown: of a run that diverged, up to the divergence."""
        last = run.diverged_epoch or self.node.cube.sizes["epoch"]
        kept = self.thinning.epochs(self.node.cube.sizes["epoch"])
        return [epoch for epoch in kept if epoch <= last]

    def _pages(self, kind: str, codes: np.ndarray, **more: Any) -> list[bytes]:
        """Return the codes [row, epoch, sample] as scripts of `PAGE` samples."""
        return [
            self._script(
                kind, page=page, array=encode_array(codes[:, :, start:][:, :, :PAGE]), **more
            )
            for page, start in enumerate(range(0, self.samples, PAGE))
        ]


def sheet_of(node: ExploredNode) -> SpriteSheet:
    """Return the form of a node's images."""
    sizes = node.cube["image"].sizes
    return SpriteSheet.of(sizes["row"], sizes["column"], sizes["channel"])


def read_pages(node: ExploredNode, step: int, damage: list[str]) -> Iterator[np.ndarray]:
    """Yield the images of each file of sprites; those that are damaged are grey."""
    image = node.cube["image"].transpose("sample", "row", "column", "channel")
    left = np.empty((0, *image.shape[1:]), np.uint8)
    start = 0
    for count in image.data.chunks[0]:
        try:
            values = image.data[start : start + count].compute(scheduler="synchronous")
        except RecordError:
            last = start + count - 1
            damage.append(f"images of {node.name}, samples {start} to {last}: the digest differs")
            values = np.full((count, *image.shape[1:]), _DAMAGED_GREY, np.uint8)
        left = np.concatenate([left, values[-start % step :: step]])
        start += count
        while len(left) >= PAGE_SAMPLES:
            yield left[:PAGE_SAMPLES]
            left = left[PAGE_SAMPLES:]
    if len(left):
        yield left


def read_rows(node: ExploredNode, step: int, damage: list[str]) -> Iterator[list[Any]]:
    """Yield the values of each file of rows, with 6 significant digits; null where damaged."""
    source = open_source(node.source, node.info.digest, node.info.chunks)
    assert source is not None  # the cube has opened it
    count = node.info.sample_count
    for start in range(0, count, PAGE * step):
        stop = min(count, start + PAGE * step)
        try:
            values = source.read("train_values", start, stop)[::step]
        except RecordError:
            words = f"values of {node.name}, samples {start} to {stop - 1}: the digest differs"
            damage.append(words)
            yield [None] * len(range(start, stop, step))
            continue
        rows = values.reshape(len(values), -1)[:, :MOST_VALUES].tolist()
        yield [[_short(value) for value in row] for row in rows]


def _short(value: float) -> float | None:
    """Return a number with 6 significant digits; None, which JSON has, if it is not finite."""
    if isinstance(value, int):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


def decode_column(encoded: str) -> np.ndarray:
    """Return a column from its base64."""
    return np.frombuffer(base64.b64decode(encoded), "<f4")


def measure_node(node: ExploredNode, planned: int, chosen: Sequence[ExploredRun]) -> NodeSize:
    """Return what the size of a node follows from.

    Parameters
    ----------
    node
        The node.
    planned
        Number of runs whose history is written once they are committed.
    chosen
        Those of them that are.
    """
    layers = node.cube.sizes["layer"]
    plain, by_layer = 5, 2 * layers
    others = len(node.planned) * plain + sum(count_derived(node, run) for run in node.runs)
    per_layer = by_layer * (len(node.planned) if layers <= MOST_LAYERS else 1)
    return NodeSize(
        samples=node.info.sample_count,
        epochs=node.cube.sizes["epoch"],
        columns=others + per_layer + len(node.cube["strategy"]),
        histories=planned,
        rows=layers + 1,
        others=_sample_bytes(node),
        influence=tuple(len(targets_of_run(node, run)) for run in chosen),
        layers=layers,
    )


def _sample_bytes(node: ExploredNode) -> float:
    """Return the bytes of a sample's image or values, of the first page, and of its name."""
    names = 0.0
    if "file" in node.cube.coords:
        files = node.cube["file"].values[:PAGE].tolist()
        names = sum(len(file) + 3 for file in files) / len(files)
    if "image" in node.cube:
        page = next(read_pages(node, 1, []))
        return names + len(sheet_of(node).encode(page)) / len(page)
    if node.runs:
        rows = next(read_rows(node, 1, []))
        return names + len(script(rows)) / len(rows)
    return names
