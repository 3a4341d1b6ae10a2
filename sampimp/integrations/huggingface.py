"""Record importance in the `Trainer` of Hugging Face's transformers.

Map: `HuggingFaceImportance`, a callback for `transformers.Trainer`. Its base class is looked up
when an instance is made, so that importing this module does not import transformers.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sampimp.errors import require_package
from sampimp.integrations.recorded_steps import RecordedSteps

if TYPE_CHECKING:
    from transformers import TrainerCallback
else:
    TrainerCallback = object


class HuggingFaceImportance(RecordedSteps, TrainerCallback):
    """A `transformers` callback that records importance inside a `with` block.

    `Trainer` reports no exception to its callbacks, so the block ends a step that failed. Inside
    the block, the index is removed from each batch before the model receives it.

    Parameters
    ----------
    trainer
        A `transformers.Trainer` with `remove_unused_columns=False`; otherwise it would drop the
        index.
    index
        The key under which a batch contains the permanent index of its samples, shape (N,).
    **options
        `loss_reduction`, `batch_dim`, `batch_norm`, `coupled_loss`, `keep_steps` and `on_epoch` of
        `ImportanceRecorder`.

    Attributes
    ----------
    recorder : ImportanceRecorder
        Recorder of the last `train()`, available from its start. Epochs count from 1.

    Raises
    ------
    UnsupportedError
        When training starts: several processes or devices, a wrapped or compiled model, or what
        the recorder refuses.
    ConfigError
        A batch contains no index.

    Notes
    -----
    `Trainer` may divide the loss of a language model by the number of tokens in all batches of an
    update. This is a factor common to all samples, as is 1/B of a mean.

    Examples
    --------
    As in examples/language_model.py::

        with HuggingFaceImportance(trainer) as importance:
            trainer.train()
        importance.recorder.to_dataset()
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> "HuggingFaceImportance":
        """Make an instance that has transformers' base class; type checkers see it above."""
        require_package("transformers", "huggingface")
        import transformers

        return object.__new__(type(cls.__name__, (cls, transformers.TrainerCallback), {}))

    def __init__(self, trainer: Any, index: str = "index", **options: Any) -> None:
        super().__init__(options)
        self._trainer, self._index = trainer, index
        self._handle: Any = None  # of the hook on the model

    def __enter__(self) -> "HuggingFaceImportance":
        """Add the callback to the trainer."""
        self._trainer.add_callback(self)
        return self

    def __exit__(self, *_: object) -> None:
        """Abandon an unfinished step, and remove the hook and the callback."""
        self._abandon_step()
        self._remove_hook()
        self._trainer.remove_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the recorder, and register a hook that sees the model's batches."""
        trainer = self._trainer
        optimizer = trainer.optimizer.optimizer  # inside the optimizer of accelerate
        processes = max(args.world_size, args.n_gpu)
        self._start_training(trainer.model, trainer.model_wrapped, optimizer, processes)
        self._remove_hook()
        self._handle = trainer.model.register_forward_pre_hook(self._on_call, with_kwargs=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Complete the step."""
        self._finish_step()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Abandon a step that the end of training has interrupted, and report the epoch."""
        self._abandon_step()
        self.recorder.end_epoch()

    def _on_call(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Remove the index from a batch; a training batch begins a step, or adds a pass to it."""
        index = kwargs.pop(self._index, None)
        if model.training and torch.is_grad_enabled():
            if index is None:
                raise self._missing_index(
                    f"a batch of {', '.join(kwargs)}",
                    "add the column to the data set: each sample's position in it; set "
                    "TrainingArguments(remove_unused_columns=False), and check that the collator "
                    "keeps it",
                )
            self._begin_pass(index, int(self._trainer.state.epoch) + 1)
        return args, kwargs

    def _remove_hook(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
