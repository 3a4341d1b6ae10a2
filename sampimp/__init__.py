"""Sample importance: which training samples shaped a network, in which layer, and when.

Record a training loop
    `ImportanceRecorder` (any PyTorch loop), `LightningImportance`, `HuggingFaceImportance`,
    `snapshot_importance` (all samples at fixed parameters)
Go backward through a recorded run
    `ReversePass` (the influence of every sample on the final model), `RecordedLoop` (your loop),
    `Smoothing`
Influence on the final model of a study's runs
    `compute_influence` (of targets, by epoch and layer), `final_importance` (of all parameters)
Read a study
    `open_cube` (all runs as one lazy, labelled cube), `to_frame` (a run as a table),
    `load_dataset` and `Dataset` (the arrays that training reads)
Train in an order of the paper
    `StrategyBatchSampler` (the batches of a strategy, by any score, for a `DataLoader`)
Extend
    `layer_rule` (an operation of a network), `derivative_rule` (an optimizer)

Packages, from the lowest level to the highest:

=============== ============================================================================
`schema`        dimensions, variables, units and chunks of a record
`errors`        named errors with four parts: expected, got, where, to do
`config`        configuration of a run, and its fingerprint
`importance`    the definition, and its measurement inside a training step
`data`          data sets, from their source to arrays
`store`         the store of a study: records, commits, digests, and the cube over them
`training`      training runs: loop, networks, batch strategies
`influence`     what each sample did to the final model: the reverse pass through a run
`integrations`  PyTorch Lightning and Hugging Face Trainer
`sweeps`        studies on Ray Tune, and the command `sampimp` (extra `study`)
`analysis`      results, claims, figures and the report (extra `report`)
=============== ============================================================================
"""

from typing import TYPE_CHECKING

from sampimp._lazy import import_on_use
from sampimp.schema import __version__

if TYPE_CHECKING:
    from sampimp.analysis.removal_prediction import predicted_removal
    from sampimp.analysis.sample_frame import to_frame
    from sampimp.data import Dataset, load_dataset
    from sampimp.importance.optimizers import derivative_rule
    from sampimp.importance.recorder import ImportanceRecorder
    from sampimp.importance.rules.registry import layer_rule
    from sampimp.importance.snapshot import snapshot_importance
    from sampimp.influence.recorded_loop import RecordedLoop
    from sampimp.influence.replay import Smoothing
    from sampimp.influence.reverse_pass import ReversePass
    from sampimp.integrations.huggingface import HuggingFaceImportance
    from sampimp.integrations.lightning import LightningImportance
    from sampimp.store.cube import open_cube
    from sampimp.sweeps.influence_study import compute_influence, final_importance
    from sampimp.training.batch_sampler import StrategyBatchSampler

__all__ = [
    "Dataset",
    "HuggingFaceImportance",
    "ImportanceRecorder",
    "LightningImportance",
    "RecordedLoop",
    "ReversePass",
    "Smoothing",
    "StrategyBatchSampler",
    "__version__",
    "compute_influence",
    "derivative_rule",
    "final_importance",
    "layer_rule",
    "load_dataset",
    "open_cube",
    "predicted_removal",
    "snapshot_importance",
    "to_frame",
]

_HOMES = {
    "Dataset": "sampimp.data.scaling",
    "HuggingFaceImportance": "sampimp.integrations.huggingface",
    "ImportanceRecorder": "sampimp.importance.recorder",
    "LightningImportance": "sampimp.integrations.lightning",
    "RecordedLoop": "sampimp.influence.recorded_loop",
    "ReversePass": "sampimp.influence.reverse_pass",
    "Smoothing": "sampimp.influence.replay",
    "StrategyBatchSampler": "sampimp.training.batch_sampler",
    "compute_influence": "sampimp.sweeps.influence_study",
    "derivative_rule": "sampimp.importance.optimizers",
    "final_importance": "sampimp.sweeps.influence_study",
    "layer_rule": "sampimp.importance.rules.registry",
    "load_dataset": "sampimp.data.loading",
    "open_cube": "sampimp.store.cube",
    "predicted_removal": "sampimp.analysis.removal_prediction",
    "snapshot_importance": "sampimp.importance.snapshot",
    "to_frame": "sampimp.analysis.sample_frame",
}

__getattr__, __dir__ = import_on_use(__name__, _HOMES)
