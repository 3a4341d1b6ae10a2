"""Record importance in the `Trainer` of Hugging Face's transformers.

Map: `HuggingFaceImportance`, a callback for `transformers.Trainer`. Its base class is looked up
when an instance is made, so that importing this module does not import transformers. `STATE_FILE`
is the recording in a checkpoint.
"""

import os
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sampimp.errors import ConfigError, require_package
from sampimp.integrations.recorded_steps import RecordedSteps

if TYPE_CHECKING:
    from transformers import TrainerCallback
else:
    TrainerCallback = object

STATE_FILE = "sampimp_recorder.pt"
"""Name of the recording in the folder of a checkpoint."""


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
        Recorder of the last `train()`, available from its start. Epochs count from 1. Checkpoints
        of the trainer contain its state, and `train(resume_from_checkpoint=...)` goes on with it.

    Raises
    ------
    UnsupportedError
        When training starts: several processes or devices, a wrapped or compiled model, or what
        the recorder refuses.
    ConfigError
        A batch contains no index. When training is resumed: the checkpoint's recording cannot be
        read, is of another network or training set, or ends at another step than the checkpoint.

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
        self._checkpoint: Any = None  # from which the training is resumed

    def __enter__(self) -> "HuggingFaceImportance":
        """Add the callback to the trainer."""
        self._trainer.add_callback(self)
        self._train = self._trainer.train
        # The trainer tells no callback from which checkpoint it resumes.
        self._trainer.train = self._train_noted
        return self

    def _train_noted(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Call the trainer's `train`, and note the checkpoint from which it resumes."""
        self._checkpoint = resume_from_checkpoint or None
        return self._train(resume_from_checkpoint, *args, **kwargs)

    def __exit__(self, *_: object) -> None:
        """Abandon an unfinished step, and remove the hook and the callback."""
        self._abandon_step()
        self._remove_hook()
        self._trainer.remove_callback(self)
        self._trainer.train = self._train

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make or restore the recorder, and register a hook that sees the model's batches."""
        trainer = self._trainer
        optimizer = trainer.optimizer.optimizer  # inside the optimizer of accelerate
        processes = max(args.world_size, args.n_gpu)
        self._start_training(
            trainer.model,
            trainer.model_wrapped,
            optimizer,
            processes,
            state.global_step,
            trainer.train_dataset,
        )
        if self._checkpoint is not None:
            self._restore(args, state)
        self._remove_hook()
        self._handle = trainer.model.register_forward_pre_hook(self._on_call, with_kwargs=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Complete the step."""
        self._finish_step(state.global_step)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Abandon a step that the end of training has interrupted, and report the epoch."""
        self._abandon_step()
        self.recorder.end_epoch()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the recording into the folder of the checkpoint."""
        run = Path(self._trainer._get_output_dir(trial=self._trainer._trial))
        path = run / f"checkpoint-{state.global_step}" / STATE_FILE
        if args.should_save and path.parent.is_dir():
            written = path.with_suffix(".writing")
            torch.save(self._saved(), written)
            os.replace(written, path)  # whole, or not there

    def _restore(self, args: Any, state: Any) -> None:
        """Go on with the recording of the checkpoint from which the training is resumed."""
        from transformers.trainer_utils import get_last_checkpoint

        is_last = self._checkpoint is True
        folder = get_last_checkpoint(args.output_dir) if is_last else self._checkpoint
        path = Path(folder) / STATE_FILE
        if not path.exists():
            self._warn_of_missing_epochs(str(path.parent), int(state.epoch) + 1)
            return
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            raise ConfigError(
                expected="the recording of a checkpoint",
                # Not the text of the error, which advises to load the file as code.
                got=f"a file of {path.stat().st_size} bytes that torch.load cannot read",
                where=str(path),
                todo="resume from another checkpoint, or delete this file: the recording then "
                "begins at the checkpoint",
            ) from error
        self._go_on(saved, str(path))

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
