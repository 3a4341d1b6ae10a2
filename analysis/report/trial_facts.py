"""Facts about the trials of a study: machine, versions, fingerprints, and the number planned.

Map: `describe_trials`, `count_planned`; `flatten` (nested mappings as dotted names).
"""

from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sampimp.analysis.report.contents import join_values
from sampimp.store.location import Folder
from sampimp.store.plan import read_commits
from sampimp.store.plan_files import read_plan

PER_TRIAL_KEYS = (
    *("curves", "dataset", "digests", "diverged_epoch", "epochs", "fingerprint", "order_seed"),
    *("plan", "reference", "seconds", "seed", "strategy"),
)
"""Keys of trial.json and COMMIT.json that describe one trial alone, or that the cube has too."""


def count_planned(out: str) -> Counter[str]:
    """Return the number of trials in the plan, by node of the cube."""
    plan = read_plan(Folder.of(out))
    return Counter(plan.node(trial.dataset) for trial in plan.trials()) if plan else Counter()


def describe_trials(out: str) -> dict[str, Any]:
    """Return machine and versions of the committed trials, and each trial's fingerprint.

    Most values are equal in all trials. Different values of one key are listed, each once.
    """
    folder = Folder.of(out) / "trials"
    commits = read_commits(Folder.of(out))
    with ThreadPoolExecutor(16) as pool:  # an object store takes tens of milliseconds a request
        contents = pool.map(lambda trial: folder.read_json(f"{trial}/trial.json") or {}, commits)
        descriptions = dict(zip(commits, contents, strict=True))
    values_by_key: dict[str, dict[str, Any]] = {}
    fingerprints = {}
    for trial, commit in sorted(commits.items()):
        seconds = sum(commit.get("seconds", ()))
        entry = [str(commit.get("fingerprint", "")), f"{commit.get('epochs', '?')} epochs"]
        if commit.get("diverged_epoch") is not None:
            entry.append(f"diverged in epoch {commit['diverged_epoch']}")
        fingerprints[trial] = ", ".join([*entry, f"{seconds:.0f} s"])
        merged = {**descriptions[trial], **commit}
        common = {key: value for key, value in merged.items() if key not in PER_TRIAL_KEYS}
        for key, value in flatten(common):
            values_by_key.setdefault(key, {})[str(value)] = value
    groups: dict[str, Any] = {}
    for key, values in values_by_key.items():
        group, _, rest = key.partition(".")
        place = (group, rest) if rest else ("trials", group)
        groups.setdefault(place[0], {})[place[1]] = join_values(values, 12)
    if fingerprints:
        groups["fingerprints"] = fingerprints
    return groups


def flatten(value: Any, name: str = "") -> list[tuple[str, Any]]:
    """Return nested mappings as pairs of dotted name and value.

    A list of plain values is one value.

    Examples
    --------
    >>> flatten({"versions": {"torch": "2.13.0"}, "hidden": [512, 512]})
    [('versions.torch', '2.13.0'), ('hidden', '512, 512')]
    """
    if isinstance(value, Mapping) and value:
        return [
            pair
            for key, item in value.items()
            for pair in flatten(item, f"{name}.{key}" if name else str(key))
        ]
    if isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value):
        return [
            pair for index, item in enumerate(value) for pair in flatten(item, f"{name}[{index}]")
        ]
    if isinstance(value, list):
        return [(name, ", ".join(map(str, value)))]
    return [(name, value)]
