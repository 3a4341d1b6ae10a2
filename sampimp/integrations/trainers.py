"""Record importance in the trainers that people use: PyTorch Lightning and Hugging Face `Trainer`.

A trainer's hooks surround its training step as `ImportanceRecorder.step` does: the step is entered
where a batch meets the model and left after the optimizer's update. What is exact, and what is
refused, is the recorder's. A batch has to say which samples are in it, by their permanent index.

Map: `LightningImportance`, a callback for `lightning.pytorch.Trainer`; `HuggingFaceImportance`, one
for `transformers.Trainer`. Their base classes are taken when they are made, so that nobody needs a
trainer who does not use it.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sampimp.errors import ConfigError, UnsupportedError
from sampimp.importance.recorder import ImportanceRecorder, Index

if TYPE_CHECKING:
    from lightning.pytorch import Callback
    from transformers import TrainerCallback
else:
    Callback = TrainerCallback = object


class _Steps:
    """One recorded step at a time, from its first batch to its update."""

    recorder: ImportanceRecorder
    """Of the last training that was started; made at its start."""

    _index: Any
    """Where a batch says which samples it holds."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._step: AbstractContextManager[Callable[[Index], None]] | None = None
        self._add_pass: Callable[[Index], None]

    def _start(
        self, model: nn.Module, called: Any, optimizer: torch.optim.Optimizer, processes: int
    ) -> None:
        """Make the recorder of a training in which the trainer calls `called` as its model."""
        self._abandon()
        if called is not model or processes > 1:
            raise UnsupportedError(
                expected="one process that trains on one device, and calls the model itself",
                got=f"{processes} of them, and {type(called).__name__} "
                f"{'' if called is model else 'around '}{type(model).__name__}",
                where=type(self).__name__,
                todo="train on one device, without compilation, FSDP or DeepSpeed",
            )
        self.recorder = ImportanceRecorder(model, optimizer, **self._options)

    def _meet(self, index: Index, epoch: int) -> None:
        """Begin a step with a batch, or go on with it, where gradients are accumulated."""
        if self._step is None:
            step = self.recorder.step(index, epoch=epoch)
            self._add_pass = step.__enter__()
            self._step = step
        else:
            self._add_pass(index)

    def _finish(self) -> None:
        """Take in a step that has made its update."""
        if self._step is not None:
            step, self._step = self._step, None
            step.__exit__(None, None, None)

    def _abandon(self) -> None:
        """Forget a step that came to no update, and watch no longer."""
        if self._step is not None:
            step, self._step = self._step, None
            stop = GeneratorExit()
            step.__exit__(type(stop), stop, None)

    def _missing(self, got: str, todo: str) -> ConfigError:
        return ConfigError(
            expected=f"batches that say which samples they hold, in batch[{self._index!r}]",
            got=got,
            where=type(self).__name__,
            todo=todo,
        )


class LightningImportance(_Steps, Callback):
    """A `lightning.pytorch` callback that records importance.

    Parameters
    ----------
    index
        Where a batch has the permanent index of its samples, (N,): the key of a dict, the position
        in a tuple, or a function of the batch.
    **options
        `loss_reduction`, `batch_dim`, `batch_norm` and `coupled_loss` of `ImportanceRecorder`.

    Attributes
    ----------
    recorder : ImportanceRecorder
        Of the last `fit`, from its start on. Epochs count from 1.

    Raises
    ------
    UnsupportedError
        When training starts: several processes, a model that is wrapped or compiled, manual
        optimization, or what the recorder refuses. In a step: `training_step` returned None.
    ConfigError
        At a batch without an index.

    Examples
    --------
    With batches of (inputs, labels, index), as in examples/with_lightning.py::

        importance = LightningImportance(index=2)
        lightning.pytorch.Trainer(callbacks=[importance]).fit(model, loader)
        importance.recorder.to_dataset()
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> "LightningImportance":
        """Make it a callback, to which the type checker has it already."""
        import lightning.pytorch

        return object.__new__(type(cls.__name__, (cls, lightning.pytorch.Callback), {}))

    def __init__(self, index: str | int | Callable[[Any], Index] = "index", **options: Any) -> None:
        super().__init__(options)
        self._index = index
        self._updates = 0  # of the trainer, before this step

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle its settings alone, as strategies do that start processes."""
        return partial(LightningImportance, self._index, **self._options), ()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the recorder."""
        if not pl_module.automatic_optimization:
            raise UnsupportedError(
                expected="automatic optimization",
                got="manual optimization, whose steps Lightning does not tell apart",
                where=type(self).__name__,
                todo="put `with recorder.step(index, epoch=...)` of an ImportanceRecorder around "
                "each update in training_step",
            )
        # Lightning takes a compiled module out of its wrapper, and calls its compiled methods.
        compiled = pl_module._compiler_ctx is not None
        called = pl_module.training_step if compiled else trainer.model
        self._start(pl_module, called, trainer.optimizers[0], trainer.world_size)

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Begin a step, or go on with it."""
        if self._step is None:
            self._updates = trainer.global_step
        self._meet(self._index_of(batch), trainer.current_epoch + 1)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the step in once there was an update."""
        if trainer.global_step != self._updates:
            self._finish()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Forget a step that the end of training has cut off."""
        self._abandon()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Forget the step that failed."""
        self._abandon()

    def _index_of(self, batch: Any) -> Index:
        if callable(self._index):
            return self._index(batch)
        try:
            return batch[self._index]
        except (KeyError, IndexError, TypeError):
            raise self._missing(
                f"a {type(batch).__name__} without",
                "let the data set return each sample's position in it, and say where it is in a "
                "batch: LightningImportance(index=2), or a key, or a function of the batch",
            ) from None


class HuggingFaceImportance(_Steps, TrainerCallback):
    """A `transformers` callback that records importance inside a `with` block.

    `Trainer` tells its callbacks of no exception: the block ends a step that failed. Inside it, the
    index is taken out of each batch before the model would see it.

    Parameters
    ----------
    trainer
        A `transformers.Trainer` with `remove_unused_columns=False`, or it would drop the index.
    index
        The key under which a batch has the permanent index of its samples, (N,).
    **options
        `loss_reduction`, `batch_dim`, `batch_norm` and `coupled_loss` of `ImportanceRecorder`.

    Attributes
    ----------
    recorder : ImportanceRecorder
        Of the last `train()`, from its start on. Epochs count from 1.

    Raises
    ------
    UnsupportedError
        When training starts: several processes or devices, a model that is wrapped or compiled, or
        what the recorder refuses.
    ConfigError
        At a batch without an index.

    Notes
    -----
    Where `Trainer` divides the loss of a language model by the number of tokens of all batches of
    an update, this is one factor common to all samples, as is 1/B of a mean.

    Examples
    --------
    As in examples/language_model.py::

        with HuggingFaceImportance(trainer) as importance:
            trainer.train()
        importance.recorder.to_dataset()
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> "HuggingFaceImportance":
        """Make it a callback, to which the type checker has it already."""
        import transformers

        return object.__new__(type(cls.__name__, (cls, transformers.TrainerCallback), {}))

    def __init__(self, trainer: Any, index: str = "index", **options: Any) -> None:
        super().__init__(options)
        self._trainer, self._index = trainer, index
        self._handle: Any = None

    def __enter__(self) -> "HuggingFaceImportance":
        """Follow the trainer."""
        self._trainer.add_callback(self)
        return self

    def __exit__(self, *_: object) -> None:
        """Leave trainer and model as they were."""
        self._abandon()
        self._let_go()
        self._trainer.remove_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the recorder, and look at what the model is called with."""
        trainer = self._trainer
        optimizer = trainer.optimizer.optimizer  # inside that of accelerate
        processes = max(args.world_size, args.n_gpu)
        self._start(trainer.model, trainer.model_wrapped, optimizer, processes)
        self._let_go()
        self._handle = trainer.model.register_forward_pre_hook(self._on_call, with_kwargs=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the step in."""
        self._finish()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget a step that the end of training has cut off."""
        self._abandon()

    def _on_call(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Take the index out of a batch; one that is trained on begins a step, or continues it."""
        index = kwargs.pop(self._index, None)
        if model.training and torch.is_grad_enabled():
            if index is None:
                raise self._missing(
                    f"one of {', '.join(kwargs)}",
                    "add the column to the data set: each sample's position in it; set "
                    "TrainingArguments(remove_unused_columns=False), and see that the collator "
                    "keeps it",
                )
            self._meet(index, int(self._trainer.state.epoch) + 1)
        return args, kwargs

    def _let_go(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
