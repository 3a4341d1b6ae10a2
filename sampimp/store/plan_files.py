"""The plans of a study in its store: numbered files, each created once by one driver.

    OUT/plans/0001.json    the plan of the first driver, sealed
    OUT/plans/0002.json    that plan, joined with what a later driver added
    OUT/study.json         a copy of the newest, for people and for earlier versions

A driver is a process that runs `sampimp study`. Any number of them may begin at once, with the same
or with other grids. A driver joins the newest plan with its own and creates the file of the next
number, which only one process can; another one then reads again and joins again. So no grid is
lost, and settings that differ are refused by every driver but the first, before it trains.

The highest number that is undamaged counts. A plan that is damaged is set aside by the next driver,
once its successor exists, so that no number is used twice. Readers write nothing. A study of an
earlier version has study.json only.

Map: `read_plan`, `require_plan` (for readers); `store_plan` (for a driver); `find_plan`,
`StoredPlan`.
"""

import os
import re
import secrets
import socket
import time
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

from sampimp.errors import DamageWarning, StoreError
from sampimp.schema import SCHEMA_VERSION
from sampimp.store.json_types import LARGEST_JSON
from sampimp.store.location import Folder
from sampimp.store.plan import Plan
from sampimp.store.seals import DamagedFileError, seal, unseal

PLANS, PLAN_COPY = "plans", "study.json"
"""Folder of the numbered plans, and the copy of the newest."""

_WRITER = ("host", "pid", "time", "token")
"""What a numbered plan states of the driver that wrote it, beside the plan."""


class StoredPlan(NamedTuple):
    """The newest undamaged plan of a study."""

    plan: Plan | None
    """None if there is no undamaged one."""
    file: str
    """The file that holds it; empty if there is none."""
    content: bytes
    """The bytes of that file."""
    highest: int
    """The highest number of a plan, damaged or not; 0 if there is none."""
    damaged: Mapping[str, bytes]
    """Damaged files that would have counted before this one, with their bytes."""


def find_plan(folder: Folder) -> StoredPlan:
    """Return the newest undamaged plan of a study; write nothing.

    Raises
    ------
    StoreError
        The plan was written in another schema version.
    RecordError
        The file is as it was written, and is no plan of this version.
    """
    names = (folder / PLANS).files()
    numbers = sorted(int(name[:-5]) for name in names if re.fullmatch(r"\d{4,9}\.json", name))
    highest, damaged = max(numbers, default=0), {}
    for file in (*map(_file_of, reversed(numbers)), PLAN_COPY):
        content = folder.read_bytes(file, LARGEST_JSON)
        if content is None:  # set aside meanwhile
            continue
        try:
            value = unseal(content, f"{folder}/{file}", required=file != PLAN_COPY)
        except DamagedFileError:
            damaged[file] = content
            continue
        return StoredPlan(_parse(value, f"{folder}/{file}"), file, content, highest, damaged)
    return StoredPlan(None, "", b"", highest, damaged)


def _file_of(number: int) -> str:
    return f"{PLANS}/{number:04d}.json"


def _parse(value: Mapping[str, Any], where: str) -> Plan:
    """Return the plan that a file holds."""
    if value.get("schema_version") != SCHEMA_VERSION:
        raise StoreError(
            expected=f"a study in schema version {SCHEMA_VERSION}",
            got=f"version {value.get('schema_version')}",
            where=where,
            todo=f"read it with the release that wrote it ({value.get('code', 'unknown')})",
        )
    return Plan.from_json({k: v for k, v in value.items() if k not in _WRITER}, where)


def read_plan(folder: Folder) -> Plan | None:
    """Return the plan of a study, or None if there is none, or none that is undamaged.

    Warns
    -----
    DamageWarning
        A plan is damaged, and the one before is used.

    Raises
    ------
    StoreError, RecordError
        As of `find_plan`.
    """
    stored = find_plan(folder)
    if stored.plan is not None and stored.damaged:
        warnings.warn(
            f"{', '.join(stored.damaged)} of {folder}: damaged, {stored.file} is used. What a "
            "driver added later is missing until its command is run again.",
            DamageWarning,
            stacklevel=2,
        )
    return stored.plan


def require_plan(folder: Folder) -> Plan:
    """Return the plan of a study, or raise StoreError if there is no study."""
    folder.check_reachable()
    plan = read_plan(folder)
    if plan is not None:
        return plan
    if damaged := find_plan(folder).damaged:
        raise StoreError(
            expected="a study with an undamaged plan",
            got=f"{' and '.join(damaged)}, damaged",
            where=str(folder),
            todo="run the command of the study again: it sets the damaged plan aside, and writes "
            "its own",
        )
    raise StoreError(
        expected="a study, with a study.json",
        got="no such file",
        where=str(folder),
        todo="pass the folder or URL that `sampimp study` wrote to (its --out)",
    )


def store_plan(folder: Folder, requested: Plan) -> tuple[Plan, list[str]]:
    """Join the newest plan with the requested one, and store the result, in one step.

    Parameters
    ----------
    folder
        The store of the study.
    requested
        What this driver is to train.

    Returns
    -------
    plan : Plan
        The joined plan.
    set_aside : list of str
        Damaged plans that were moved into OUT/withdrawn.

    Raises
    ------
    ConfigError
        The plans differ in their settings; nothing was written.
    StoreError, RecordError
        As of `find_plan`.
    """
    while True:
        stored = find_plan(folder)
        plan = requested if stored.plan is None else stored.plan.joined(requested, str(folder))
        is_stored = stored.file.startswith(PLANS) and plan == stored.plan
        file, content = stored.file, stored.content
        if is_stored and not stored.damaged:
            break
        values = (socket.gethostname(), os.getpid(), time.time(), secrets.token_hex(8))
        writer = dict(zip(_WRITER, values, strict=True))
        file, content = _file_of(stored.highest + 1), seal({**plan.to_json(), **writer})
        if folder.create_bytes(file, content):
            break
    for name, damage in stored.damaged.items():
        _set_aside(folder, name, damage)
    _copy(folder, file, content)
    return plan, list(stored.damaged)


def _set_aside(folder: Folder, file: str, content: bytes) -> None:
    """Move a damaged plan into OUT/withdrawn."""
    name, number = f"withdrawn/{file.replace('/', '-')}", 1
    while not folder.create_bytes(name, content):  # another damaged file had the same name
        number += 1
        name = f"withdrawn/{file.replace('/', '-').removesuffix('.json')}-{number}.json"
    folder.delete(file)


def _copy(folder: Folder, file: str, content: bytes) -> None:
    """Make study.json a copy of a plan, or of a newer one that is created meanwhile."""
    while True:
        if folder.read_bytes(PLAN_COPY) != content:
            folder.write_bytes(PLAN_COPY, content)
        # The plan of another driver may be newer, and its copy may have been written before.
        newest = find_plan(folder)
        if newest.file == file or not newest.file.startswith(PLANS):
            return
        file, content = newest.file, newest.content
