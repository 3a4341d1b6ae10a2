"""What is left out of a large study, so that its explorer stays below a size.

First the histories, and influence by epoch, lose epochs: every k-th is kept, and the last. Then
influence by epoch loses targets, the last ones first. Then samples are left out: every m-th is
kept. The size is estimated from the plan and not from the committed runs, so that a study that
grows is thinned alike from the start, and its parts are kept. Influence, which no plan has, counts
once it is committed.

Map: `NodeSize`, `Thinning`, `choose_thinning`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

LEAST_EPOCHS = 10
"""Epochs of a history that are kept before samples are left out (arbitrary)."""
MOST_TARGETS = 32
"""Targets of influence that are shown of a run (arbitrary)."""
BASE64 = 4 / 3


@dataclass(frozen=True)
class NodeSize:
    """What the size of a node's parts follows from.

    Parameters
    ----------
    samples, epochs
        Numbers of them.
    columns
        Numbers of a sample, over all runs.
    histories, rows
        Number of histories, and of rows in each.
    others
        Bytes of a sample's image, values and name.
    influence
        Number of targets of influence by epoch, in each run that shows it.
    layers
        Rows of each of them.
    """

    samples: int
    epochs: int
    columns: int
    histories: int
    rows: int
    others: float
    influence: tuple[int, ...] = ()
    layers: int = 0

    def bytes(self, thinning: "Thinning") -> float:
        """Return the size after thinning."""
        kept = len(thinning.epochs(self.epochs))
        targets = sum(min(count, thinning.targets) for count in self.influence)
        rows = self.histories * self.rows + targets * self.layers
        numbers = 2 + 4 * self.columns + 2 * rows * kept
        return -(-self.samples // thinning.sample_step) * (BASE64 * numbers + self.others)


@dataclass(frozen=True)
class Thinning:
    """Every how many epochs of a history, and samples, one is kept; and how many targets."""

    epoch_step: int = 1
    sample_step: int = 1
    targets: int = MOST_TARGETS
    """Largest number of targets of a run whose influence by epoch is kept."""

    def epochs(self, count: int) -> list[int]:
        """Return the kept epochs of `count`, from 1.

        Examples
        --------
        >>> Thinning(3).epochs(8)
        [1, 4, 7, 8]
        """
        kept = range(1, count + 1, self.epoch_step)
        return [*kept, *([count] if count not in kept else [])]

    def notes(self, megabytes: float) -> list[str]:
        """Return what is left out, in sentences."""
        size = f"so that the folder stays below {megabytes:g} MB"
        lines = []
        if self.epoch_step > 1:
            lines.append(
                f"The histories hold one epoch of {self.epoch_step}, and the last, {size}."
            )
        if self.targets < MOST_TARGETS:
            some = "target" if self.targets == 1 else f"{self.targets} targets"
            lines.append(f"Influence by epoch is on the first {some} of a run, {size}.")
        if self.sample_step > 1:
            lines.append(f"One sample of {self.sample_step} is shown, {size}.")
        return lines


def choose_thinning(nodes: Sequence[NodeSize], megabytes: float) -> Thinning:
    """Return the least thinning with which the nodes stay below a size.

    Examples
    --------
    >>> mnist = NodeSize(samples=60_000, epochs=50, columns=500, histories=1, rows=5, others=300)
    >>> choose_thinning([mnist], 200)
    Thinning(epoch_step=2, sample_step=1, targets=32)
    >>> choose_thinning([mnist], 150)
    Thinning(epoch_step=5, sample_step=2, targets=32)
    """

    def fits(thinning: Thinning) -> bool:
        return sum(node.bytes(thinning) for node in nodes) <= 1e6 * megabytes

    longest = max((node.epochs for node in nodes), default=1)
    step = 1
    while step < max(1, longest // LEAST_EPOCHS) and not fits(Thinning(step)):
        step += 1
    held = max((count for node in nodes for count in node.influence), default=0)
    targets = MOST_TARGETS
    if held > 1 and not fits(Thinning(step)):
        targets = next((t for t in range(held - 1, 0, -1) if fits(Thinning(step, 1, t))), 1)
    samples, most = 1, max((node.samples for node in nodes), default=1)
    while samples < most and not fits(Thinning(step, samples, targets)):
        samples += 1
    return Thinning(step, samples, targets)
