"""Record importance in PyTorch Lightning.

Map: `LightningImportance`, a callback for `lightning.pytorch.Trainer`. Its base class is looked up
when an instance is made, so that importing this module does not import Lightning.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from sampimp.errors import ConfigError, UnsupportedError, require_package
from sampimp.importance.sample_index import Index
from sampimp.integrations.recorded_steps import RecordedSteps

if TYPE_CHECKING:
    from lightning.pytorch import Callback
else:
    Callback = object


class LightningImportance(RecordedSteps, Callback):
    """A `lightning.pytorch` callback that records importance.

    Parameters
    ----------
    index
        Where a batch contains the permanent index of its samples, shape (N,): the key of a dict,
        the position in a tuple, or a function of the batch.
    **options
        `loss_reduction`, `batch_dim`, `batch_norm`, `coupled_loss`, `keep_steps` and `on_epoch` of
        `ImportanceRecorder`.

    Attributes
    ----------
    recorder : ImportanceRecorder
        Recorder of the last `fit`, available from its start. Epochs count from 1. Lightning's
        checkpoints contain its state, and `fit(ckpt_path=...)` goes on with it.

    Raises
    ------
    UnsupportedError
        When training starts: several processes, a wrapped or compiled model, manual optimization,
        or what the recorder refuses. In a step: `training_step` returned None.
    ConfigError
        A batch contains no index. When training is resumed: the checkpoint's recording is of
        another network or training set, or ends at another step than the checkpoint.

    Examples
    --------
    With batches of (inputs, labels, index), as in examples/with_lightning.py::

        importance = LightningImportance(index=2)
        lightning.pytorch.Trainer(callbacks=[importance]).fit(model, loader)
        importance.recorder.to_dataset()
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> "LightningImportance":
        """Make an instance that has Lightning's base class; type checkers see it above."""
        require_package("lightning.pytorch", "lightning")
        import lightning.pytorch

        return object.__new__(type(cls.__name__, (cls, lightning.pytorch.Callback), {}))

    def __init__(self, index: str | int | Callable[[Any], Index] = "index", **options: Any) -> None:
        super().__init__(options)
        self._index = index
        self._updates = 0  # of the trainer, before this step
        self._trainer: Any = None  # while it trains
        self._loaded: dict[str, Any] | None = None  # from a checkpoint, until training starts

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle only the settings, for strategies that start processes."""
        return partial(LightningImportance, self._index, **self._options), ()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Forget the state of another checkpoint, such as that of `test(ckpt_path=...)`."""
        self._loaded = None

    def state_dict(self) -> dict[str, Any]:
        """Return the recording so far, for Lightning's checkpoint; nothing if there is none."""
        if self._trainer is None:
            return {}
        self._finish_counted_step()  # another callback may save at the end of a batch
        try:
            return self._saved()
        except ConfigError as error:  # the training has failed, and is saved by on_exception
            warnings.warn(f"The checkpoint contains no recording: {error.summary}", stacklevel=2)
            return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Note a checkpoint's recording, until training starts."""
        self._loaded = state_dict

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the recorder, which goes on from the checkpoint if training does."""
        self._trainer = None
        if not pl_module.automatic_optimization:
            raise UnsupportedError(
                expected="automatic optimization",
                got="manual optimization, in which Lightning does not report single steps",
                where=type(self).__name__,
                todo="put `with recorder.step(index, epoch=...)` of an ImportanceRecorder around "
                "each update in training_step",
            )
        # Lightning takes a compiled module out of its wrapper, and calls its compiled methods.
        compiled = pl_module._compiler_ctx is not None
        called = pl_module.training_step if compiled else trainer.model
        self._start_training(
            pl_module,
            called,
            trainer.optimizers[0],
            trainer.world_size,
            trainer.global_step,
            getattr(trainer.train_dataloader, "dataset", None),
        )
        if self._loaded:
            self._go_on(self._loaded, str(trainer.ckpt_path))
            self._loaded = None
        elif trainer.ckpt_path is not None and trainer.global_step:
            self._warn_of_missing_epochs(str(trainer.ckpt_path), trainer.current_epoch + 1)
        self._trainer = trainer

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Begin a step, or add a pass to it."""
        if self._step is None:
            self._updates = trainer.global_step
        self._begin_pass(self._index_of(batch), trainer.current_epoch + 1)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Complete the step if its update was made."""
        self._finish_counted_step()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Abandon a step that the end of training has interrupted, and report the epoch."""
        self._abandon_step()
        self.recorder.end_epoch()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Abandon the step that failed, unless its update was made."""
        self._finish_counted_step()
        self._abandon_step()

    def _finish_counted_step(self) -> None:
        """Complete the step if the trainer has counted its update."""
        if self._step is not None and self._trainer.global_step != self._updates:
            self._finish_step(self._trainer.global_step)

    def _index_of(self, batch: Any) -> Index:
        if callable(self._index):
            return self._index(batch)
        try:
            return batch[self._index]
        except (KeyError, IndexError, TypeError):
            raise self._missing_index(
                f"a {type(batch).__name__} without this entry",
                "let the data set return each sample's position in it, and say where it is in a "
                "batch: LightningImportance(index=2), or a key, or a function of the batch",
            ) from None
