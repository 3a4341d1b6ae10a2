"""Training runs: the loop, the networks, the batch strategies, the process group.

Map: `loop` (`TrainingRun`: one network through its epochs, one record per epoch), `steps` (a
training step by autograd, and the optimizers), `fused` (the same step written out for stacks of
linear layers), `models` (the networks of a study), `identity` (what identifies a user's own
network), `strategies` (which samples form which batch), `batch_sampler` (the same in a `DataLoader`
of your own), `collective` (several processes that train one network), `checkpoint_states` (loading
what a checkpoint holds).
"""

from sampimp._renamed import moved
from sampimp.training.loop import TrainingRun, evaluate, use_deterministic_algorithms
from sampimp.training.steps import AutogradStep, make_optimizer

__all__ = [
    "AutogradStep",
    "TrainingRun",
    "evaluate",
    "make_optimizer",
    "use_deterministic_algorithms",
]

__getattr__ = moved(__name__)
