"""The validation split: training samples by whose labels rules and their parameters are chosen.

Neither the selection nor the training of a subset that is judged on it uses these samples. The
scores come from the study's run, which was trained on all samples, these included.

Map: `validation_samples`.
"""

import numpy as np

from sampimp.errors import DataError

VALIDATION_SHARE = 0.1
"""Share of each class in the validation split (arbitrary)."""

VALIDATION_SEEDS = (1, 2)
"""Seeds of the trainings that are judged on it; fixed, so that choices do not change."""


def validation_samples(labels: np.ndarray) -> np.ndarray:
    """Return the positions of the validation samples, sorted: a tenth of each class, at least one.

    Raises
    ------
    DataError
        A class has a single sample.

    Examples
    --------
    >>> labels = np.repeat([0, 1], [30, 4])
    >>> np.bincount(labels[validation_samples(labels)])
    array([3, 1])
    """
    order = np.random.default_rng(0).permutation(len(labels))
    chosen = []
    for label in np.unique(labels):
        members = order[labels[order] == label]
        if len(members) < 2:
            raise DataError(
                expected="at least two training samples of each class, one for the validation "
                "split",
                got=f"one of class {label}",
                where="the training set",
                todo="add samples of this class, or leave it out",
            )
        chosen.append(members[: max(1, round(VALIDATION_SHARE * len(members)))])
    return np.sort(np.concatenate(chosen))
