"""Changes of the files of a study, each drawn by a generator of random numbers.

Map: `mutate`, which makes one to three of them.
"""

import contextlib
import hashlib
import json
import os
import shutil

import numpy as np

from sampimp.store.influence_layouts import INFLUENCE_FOLDER, layout_of
from sampimp.store.integrity import chunk_digests
from sampimp.store.location import Folder
from sampimp.store.plan_files import require_plan
from sampimp.store.seals import is_sealed, seal
from sampimp.store.zarr_arrays import open_for_writing

VALUES = (
    *(None, True, False, -1, 0, 1, 2, 3, 1000, 2**20, 2**25, 2**28 - 1, 2**28, 2**31, 2**63 - 1),
    *(2**63, 10**30, 10**400, 0.5, -0.0, 1e-320, 1e12, 1e13, 1e308, -1e308),
    *(float("nan"), float("inf"), float("-inf")),
    *(
        "",
        "x",
        " ",
        ".",
        "..",
        "../../outside",
        "/etc/passwd",
        "x:../../../outside",
        "\x00",
        "a\x00",
    ),
    *("\x1b[31m", "\N{GRINNING FACE}" * 9, "<script>alert(1)</script>", "<img src=x onerror=y>"),
    *("record-2.zarr", "float64", "9" * 5000, "class:" + "9" * 5000, "__import__('os')"),
    *("A" * 10**6, "probe:0", "probe:0@L9", "none", "full", "chosen", "shuffle", "$\\frac$"),
    *([], {}, [[]], [None], [0] * 1000, {"": ""}, {"name": "gzip"}, [[0, "record.zarr"]] * 3),
    *([[1e300] * 3] * 3, ["a", "a"], [f"name {n}" for n in range(20)], {"2": ["0" * 64]}),
)

LARGEST = 2**30
"""Bytes of the largest file whose content is changed."""

OFTEN = (
    *("plans", "study.json study.json", "snapshots.json snapshots.json", "trials COMMIT.json"),
    *("influence COMMIT.json", "datasets zarr.json", "trials MANIFEST.json", ".js"),
)
"""Kinds of files that are changed more often than others."""


def mutate(root, draw):
    """Change one file, now and then two or three; return what was changed.

    Parameters
    ----------
    root
        The folder with the study, and with the data sets beside it.
    draw
        A `random.Random`.
    """
    files = sorted(path for path in root.rglob("*") if path.is_file())
    part = "study" if draw.random() < 0.9 else draw.choice(("a.npz", "images"))
    by_kind = {}
    for path in files:
        if path.relative_to(root).parts[0] == part:
            by_kind.setdefault(_kind_of(path.relative_to(root)), []).append(path)
    kinds = [kind for kind in sorted(by_kind) for _ in range(5 if kind in OFTEN else 1)]
    count = draw.choice((1, 1, 1, 1, 1, 2, 2, 3))
    changed = []
    for _ in range(count):
        if part == "study" and draw.random() < 0.15:
            changed.append(_change_values(root / "study", draw))
        else:
            kind = draw.choice(kinds)
            path = draw.choice(by_kind[kind])
            with contextlib.suppress(ValueError, LookupError, TypeError, OSError):  # changed before
                _change_file(path, by_kind[kind], draw)
            changed.append(path.relative_to(root))
    return part, ", ".join(map(str, changed))


def _kind_of(path):
    """Return the kind of a file: its name in a folder of the study; of those that are numbered, it
    is the name of their folder, and of others the ending."""
    if path.suffix not in (".json", ".pt"):
        return path.suffix
    return path.parent.name if path.stem.isdigit() else f"{path.parts[1]} {path.name}"


def _change_file(path, siblings, draw):
    if not path.is_file() or path.is_symlink() or path.stat().st_size > LARGEST:
        return
    content = path.read_bytes()
    if draw.random() < 0.1:
        _change_kind(path, draw, siblings)
    elif path.suffix in (".json", ".js") and draw.random() < 0.85:
        path.write_bytes(_change_json(content, draw, siblings))
        _let_rest_fit(path, draw)
    else:
        path.write_bytes(_change_bytes(content, draw))
        if path.name == "state.pt" and draw.random() < 0.8:
            _let_digest_fit(path)


# Changes of JSON.
def _change_json(content, draw, siblings):
    """Return a JSON file with a value changed; sealed as before."""
    start, end = (b"sampimpData(", b");\n") if content.startswith(b"sampimpData(") else (b"", b"")
    try:
        value = json.loads(content.removeprefix(start).removesuffix(end))
    except ValueError:  # of a change before
        return content[::-1]
    path = _place_in(value, draw)
    how = draw.choice(("replace", "replace", "edit", "edit", "remove", "repeat", "rename", "swap"))
    if draw.random() < 0.02:
        depth = draw.choice((5, 40, 100_000))
        return start + b"[" * depth + content + b"]" * depth + end
    if not path:
        value = draw.choice(VALUES)
    else:
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        _change_entry(holder, path[-1], how, draw)
        if how == "swap":
            other = _value_at(draw.choice(siblings), path)
            if other is not None:
                holder[path[-1]] = other
    if is_sealed(content) and isinstance(value, dict) and draw.random() < 0.9:
        value.pop("seal", None)
        return seal(value)
    return start + json.dumps(value).encode() + end


def _place_in(value, draw):
    """Return the path of a value in a JSON file; long lists have no more weight than others."""
    path = ()
    while isinstance(value, dict | list) and value and (not path or draw.random() < 0.85):
        keys = list(value) if isinstance(value, dict) else range(len(value))
        path = (*path, draw.choice(keys))
        value = value[path[-1]]
    return path


def _change_entry(holder, key, how, draw):
    new = draw.choice(VALUES)
    if how == "replace":
        holder[key] = new
    elif how == "edit":
        holder[key] = _edited(holder[key], draw)
    elif how == "remove":
        del holder[key]
    elif how == "repeat" and isinstance(holder, list):
        holder += holder[: 10 ** draw.randint(0, 3)]
    elif how == "rename" and isinstance(holder, dict):
        text = draw.choice([value for value in VALUES if isinstance(value, str)])
        holder[text] = holder.pop(key)


def _edited(value, draw):
    """Return a value near the one that is there."""
    if isinstance(value, str):
        marks = ("<b>", "\x00", "/", "..", "\x1b[31m", "'\"", "9", ":")
        return draw.choice((value[:-1], value + draw.choice(marks), value * 2, value.upper()))
    if isinstance(value, bool) or value is None:
        return draw.choice((True, False, None))
    if isinstance(value, int | float):
        return draw.choice((value + 1, value - 1, -value, value * 2, value * 1000, value / 2))
    items = list(value.items()) if isinstance(value, dict) else list(value)
    draw.shuffle(items)
    items = items[: draw.randint(0, len(items))]
    return dict(items) if isinstance(value, dict) else items


def _value_at(path, place):
    """Return the value at a place of another file; None if it has none."""
    try:
        value = json.loads(path.read_bytes())
        for key in place:
            value = value[key]
    except (ValueError, LookupError, TypeError, OSError):
        return None
    return value


def _let_rest_fit(path, draw):
    """Let a changed file be read in spite of others, most of the time."""
    study = next(parent for parent in path.parents if parent.name == "study")
    if path.name == "study.json" and draw.random() < 0.8:
        shutil.rmtree(study / "plans", ignore_errors=True)  # as an earlier version wrote it
    if path.parents[1].name == "datasets" and draw.random() < 0.8:
        _forget_chunks(study)


def _forget_chunks(study):
    """Remove the digest of the digests of chunks from the plans."""
    for path in (*(study / "plans").glob("*.json"), study / "study.json"):
        try:
            plan = json.loads(path.read_bytes())
            plan.pop("seal", None)
            for info in plan["datasets"].values():
                info["chunks"] = ""
        except (ValueError, LookupError, TypeError, AttributeError, OSError):
            continue
        path.write_bytes(seal(plan))


def _let_digest_fit(path):
    """Give the manifest of a checkpoint the digest of its state."""
    manifest = json.loads((path.parent / "MANIFEST.json").read_bytes())
    manifest.pop("seal", None)
    manifest["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (path.parent / "MANIFEST.json").write_bytes(seal(manifest))


# Changes of values, with digests that fit.
def _change_values(study, draw):
    """Give one chunk of a record other values, and the commit their digests."""
    folder = Folder.of(study)
    places = sorted(
        path.parent
        for kind in ("trials", INFLUENCE_FOLDER)
        for path in study.glob(f"{kind}/*/COM*")
    )
    place = draw.choice(places)
    try:
        commit = json.loads((place / "COMMIT.json").read_bytes())
        layout = require_plan(folder).layout(commit["dataset"])
        layout = layout_of(commit, layout) if "kind" in commit else layout
        name = draw.choice(sorted(commit["digests"]))
        rank = draw.randrange(len(commit["digests"][name]))
        position = layout.order(name)[rank]
        array = open_for_writing(Folder.of(place) / commit["parts"][0][1], name)
        index = position if layout.is_stepwise(name) else ...
        values = np.array(array[index])
        how = draw.choice((np.nan, np.inf, -np.inf, 0, -1, 3e38, 1e-40))
        some = draw.random() < 0.5
        values[..., : 1 if some else None] = how
        array[index] = values
        commit["digests"][name][rank] = chunk_digests(values, layout.chunk(name)[-1])
    except Exception:  # a change before
        return f"{place.name} (unchanged)"
    commit.pop("seal", None)
    (place / "COMMIT.json").write_bytes(seal(commit))
    return f"{place.name}, values of {name}"


# Changes of bytes.
def _change_bytes(content, draw):
    """Return a file with bytes flipped, cut, added or replaced."""
    data = bytearray(content)
    how = draw.choice(("flip", "flip", "number", "cut", "empty", "zeros", "more", "noise"))
    if how == "flip":
        for _ in range(draw.choice((1, 1, 4, 32)) if data else 0):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif how == "number" and len(data) > 16:
        at = draw.randrange(len(data) - 8)
        data[at : at + 8] = draw.choice((0, 1, 2**31, 2**40, 2**63, 2**64 - 1)).to_bytes(
            8, "little"
        )
    elif how == "cut":
        del data[draw.randrange(len(data) + 1) :]
    elif how == "more":
        data += draw.randbytes(draw.choice((1, 100, 10**5)))
    elif how == "noise":
        data = bytearray(draw.randbytes(len(data)))
    else:
        data = bytearray(len(data) if how == "zeros" else 0)
    return bytes(data)


def _change_kind(path, draw, siblings):
    """Replace a file by what is none, or by another file of its kind."""
    how = draw.choice(("pipe", "folder", "link out", "loop", "huge", "swap", "swap", "gone"))
    content = path.read_bytes()
    path.unlink()
    others = [file for file in siblings if file != path and file.is_file()]
    if how == "pipe":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    elif how == "link out":
        path.symlink_to("/etc/passwd")
    elif how == "loop":
        path.symlink_to(path.name)
    elif how == "huge":
        path.write_bytes(content)
        os.truncate(path, 2**40)
    elif how == "swap" and others:
        shutil.copy(draw.choice(others), path)
