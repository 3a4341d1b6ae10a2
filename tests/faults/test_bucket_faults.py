"""Every request to a bucket fails once, in every command that uses it.

Every seventh here, or fewer of a long command; `make faults` lets each of them fail.
"""

import contextlib
import itertools
from datetime import timedelta

import pytest
from disturbed import EVERY, SCENES, outcome, problem_of
from memory_bucket import KINDS, serving

from sampimp.store import buckets

PATIENCE = timedelta(seconds=1)
"""How long a request may last here; an answer that is late comes after twice as long."""


@pytest.mark.parametrize("name", SCENES)
def test_after_any_fault_the_same_command_gives_the_same(name, monkeypatch):
    scene = SCENES[name]
    monkeypatch.setattr(buckets, "REQUEST_TIMEOUT", PATIENCE)
    with serving(monkeypatch, page=5) as bucket:
        scene.prepare("s3://studies/template")

        def copy(number: int) -> str:
            bucket.copy("studies/template", f"studies/study-{number:04d}")
            return f"s3://studies/study-{number:04d}"

        @contextlib.contextmanager
        def failing(number, kind):
            bucket.fail(number, kind)
            try:
                yield
            finally:
                bucket.fail(0)

        undisturbed = copy(0)
        bucket.fail(0)
        scene.command(undisturbed)
        count = len(bucket.requests)
        expected, problems = outcome(undisturbed), []
        step = EVERY * scene.stride if EVERY > 1 else 1
        kinds = itertools.cycle(KINDS)
        for number in range(1 + len(name) % step, count + 1, step):
            out, kind = copy(number), next(kinds)
            if problem := problem_of(scene, out, failing(number, kind), expected):
                problems.append(f"request {number}, {kind}: {problem}")
            bucket.remove(out.removeprefix("s3://"))
        assert not problems, "\n".join(problems)
