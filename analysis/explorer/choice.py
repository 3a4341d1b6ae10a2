"""What an explorer is asked for: runs by epoch, data sets and size.

The manifest has it, so that a study that ends writes its explorer as a person asked for it.

Map: `Choice`.
"""

from typing import Any, NamedTuple

from sampimp.store.plan import Plan

MEGABYTES = 200.0
"""Largest size of an explorer by default (arbitrary: what a browser still loads at ease)."""

LARGEST_MEGABYTES = 1e9
"""Largest size that a manifest may ask for (arbitrary)."""


class Choice(NamedTuple):
    """What an explorer is asked for."""

    runs: tuple[str, ...] = ()
    """Names of runs, or "all"; empty: the first run."""
    nodes: tuple[str, ...] = ()
    """Nodes of the cube; empty: all."""
    megabytes: float = MEGABYTES

    @classmethod
    def of(cls, asked: Any, plan: Plan) -> "Choice":
        """Return the choice in a manifest, without runs and nodes that the study does not have.

        Parameters
        ----------
        asked
            From the manifest, whatever it holds.
        plan
            The plan of the study.
        """
        held = asked if isinstance(asked, dict) else {}
        runs = {"all", *(f"{trial.strategy}-seed{trial.seed}" for trial in plan.trials())}
        return cls(
            _known(held.get("runs"), runs),
            _known(held.get("nodes"), {plan.node(key) for key in plan.datasets}),
            _size_of(held.get("megabytes")),
        )


def _size_of(value: Any) -> float:
    is_size = isinstance(value, int | float) and 0 < value < LARGEST_MEGABYTES
    return float(value) if is_size else MEGABYTES


def _known(names: Any, known: set[str]) -> tuple[str, ...]:
    held = names if isinstance(names, list) else []
    return tuple(name for name in held if isinstance(name, str) and name in known)
