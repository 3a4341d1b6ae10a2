"""Every operation of the store on a disk fails once, in every command that uses it.

Every seventh here, or fewer of a long command; `make faults` lets each of them fail.
"""

import itertools
import shutil

import pytest
from disturbed import EVERY, SCENES, outcome, problem_of
from faulty_disk import CODES, SYNCS, FaultyDisk, faulty

MUST_FAIL = ("write", "link", "replace", *SYNCS)
"""Operations whose failure may not pass for a success."""


@pytest.mark.parametrize("name", SCENES)
def test_after_any_fault_the_same_command_gives_the_same(name, tmp_path, monkeypatch):
    scene, template = SCENES[name], tmp_path / "template"
    scene.prepare(str(template))

    def copy(number: int) -> str:
        out = tmp_path / f"study-{number:04d}"
        if template.exists():
            shutil.copytree(template, out)
        return str(out)

    undisturbed, disk = copy(0), FaultyDisk()
    with faulty(monkeypatch, undisturbed, disk):
        scene.command(undisturbed)
    expected, problems = outcome(undisturbed), []
    step = EVERY * scene.stride if EVERY > 1 else 1
    codes = itertools.cycle(CODES)
    for number in range(1 + len(name) % step, disk.count + 1, step):
        out, faults = copy(number), FaultyDisk(number, next(codes))
        must_fail = lambda faults=faults: faults.failed in MUST_FAIL  # noqa: E731
        context = faulty(monkeypatch, out, faults)
        if problem := problem_of(scene, out, context, expected, must_fail):
            problems.append(f"operation {number}, {faults.failed}: {problem}")
        shutil.rmtree(out)
    assert not problems, "\n".join(problems)
