"""What a planned trial trains on: its data set and its batches. Ray is not imported here.

Map: `TrialInputs`.
"""

from collections.abc import Callable

from sampimp.config import TrialConfig
from sampimp.data import Dataset, Source, scale_inputs
from sampimp.store.location import Folder
from sampimp.store.plan import Plan
from sampimp.store.variables import read_difficulty
from sampimp.training.strategies import SORT_KEY, Schedule, make_schedule


class TrialInputs:
    """Data sets and schedules of the trials of a plan; it keeps the last data set.

    Parameters
    ----------
    folder, plan
        The study's store, and its plan.
    read
        From a data set's key to its values.
    """

    def __init__(self, folder: Folder, plan: Plan, read: Callable[[str], Source]) -> None:
        self._folder, self._plan, self._read = folder, plan, read
        self._data: tuple[str, Dataset] | None = None

    def data(self, trial: TrialConfig) -> Dataset:
        """Return the arrays that a trial trains on."""
        if self._data is None or self._data[0] != trial.dataset:
            self._data = None  # freed first: two data sets may not fit in memory
            scaling = self._plan.training.input_scaling
            self._data = trial.dataset, scale_inputs(self._read(trial.dataset), scaling)
        return self._data[1]

    def schedule(self, trial: TrialConfig, reference_id: str | None) -> Schedule:
        """Return the batches of a trial; `reference_id` is the run that its strategy sorts by."""
        layout = self._plan.layout(trial.dataset)
        difficulty = None
        if reference_id:
            reference = self._folder / "trials" / reference_id
            difficulty = read_difficulty(reference, SORT_KEY[trial.strategy], layout)
        batch_size = self._plan.training.batch_size
        return make_schedule(
            trial.strategy, layout.sample, batch_size, trial.order_seed, difficulty
        )
