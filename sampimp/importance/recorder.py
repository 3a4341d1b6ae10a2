"""Record in-step importance in any PyTorch training loop, without changing the training.

Importance is measured in the step that used the sample (Gao & Jojic 2017, section 2), from the
forward and backward passes that training runs anyway. Every torch function of a pass is recorded;
where an operation takes a parameter and a tensor that depends on samples, a hook receives the
output gradient, from which a rule forms the squared norms of the per-sample gradients. Trained
parameters are bit-identical with and without recording.

Map: `ImportanceRecorder`. `sampimp.importance.step` describes one step.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sampimp.config import check_choice
from sampimp.errors import UnsupportedError
from sampimp.importance.epoch_parts import EpochParts, importance_dataset
from sampimp.importance.recorded_step import RandomState, RecordedStep
from sampimp.importance.recorder_state import recorder_state, restore_recorder
from sampimp.importance.sample_index import Index, check_index, split_passes
from sampimp.importance.step import Capture
from sampimp.importance.update import UpdateDerivative
from sampimp.importance.update_hooks import UpdateHooks

if TYPE_CHECKING:
    import xarray as xr


class ImportanceRecorder:
    """Record in-step importance around each training step of a loop.

    Parameters
    ----------
    model
        A network that treats each sample of a batch on its own.
    optimizer
        An optimizer whose update acts elementwise on the gradient, see
        `sampimp.importance.optimizers`. It may have any groups of the model's parameters.
    loss_reduction
        How the loss is reduced over a batch, "mean" or "sum". Metadata only: the gradients contain
        the reduction, and it is stored in the attrs because importance differs by B^2 between them.
    batch_dim
        Axis of the samples in tensors that also have positions: 0, or 1 where positions come first
        (`batch_first=False`).
    batch_norm
        A BatchNorm in training mode mixes the samples. "refuse" raises an error. "undefined"
        records NaN for it and for all layers called before it; later layers are recorded.
    coupled_loss
        A loss that is no sum over samples, such as the root of a mean, has no part for each sample.
        "refuse" raises an error. "constant" takes its derivative at each sample's outputs as a
        constant of the step, and states this in the result's attrs (`loss`).
    keep_steps
        Keep in `steps` what each step was made of, so that `sampimp.ReversePass` can take the steps
        again: the samples, the settings of optimizer and modules, the norm of each gradient and, if
        the step drew random numbers (dropout), PyTorch's random state of 5 KB.
    on_epoch
        Called with each finished epoch: its number, and a Dataset with its `importance` (layer,
        sample) and `coverage`, the share of the samples with importance. See `end_epoch`.

    Raises
    ------
    UnsupportedError
        On construction: the model or the optimizer has no exact rule. In a step: gradients were
        changed by more than a factor, an operation mixes samples, or an operation with a parameter
        cannot be recorded.

    References
    ----------
    Gao & Jojic (2017), section 2. See also: GraNd = sqrt(sum over layers of importance) B / rate,
    under plain SGD.

    Examples
    --------
    Three lines are added to a loop, numbered here:

    >>> from torch.nn import functional
    >>> inputs, labels = torch.randn(6, 4), torch.randint(0, 3, (6,))
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> recorder = ImportanceRecorder(model, optimizer)                        # 1
    >>> for epoch in (1, 2):
    ...     for index in torch.randperm(6).split(3):
    ...         with recorder.step(index, epoch=epoch):                        # 2
    ...             optimizer.zero_grad()
    ...             loss = functional.cross_entropy(model(inputs[index]), labels[index])
    ...             loss.backward()
    ...             optimizer.step()
    >>> dict(recorder.to_dataset().sizes)                                      # 3
    {'epoch': 2, 'layer': 2, 'sample': 6}
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        loss_reduction: str = "mean",
        batch_dim: int = 0,
        batch_norm: str = "refuse",
        coupled_loss: str = "refuse",
        keep_steps: bool = False,
        on_epoch: "Callable[[int, xr.Dataset], object] | None" = None,
    ) -> None:
        check_choice(loss_reduction, ("mean", "sum"), "loss_reduction")
        self._derivative = UpdateDerivative(optimizer)
        self._capture = Capture(
            model, batch_dim=batch_dim, batch_norm=batch_norm, coupled_loss=coupled_loss
        )
        self.optimizer = optimizer
        self.loss_reduction = loss_reduction
        in_optimizer = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(p.requires_grad and id(p) in in_optimizer for p in model.parameters()):
            raise UnsupportedError(
                expected="an optimizer over parameters of the model",
                got="an optimizer that trains none of them",
                where="ImportanceRecorder",
                todo="make the optimizer from this model's parameters",
            )
        self._on_epoch = on_epoch
        self._epoch: int | None = None  # of the last step
        self._is_reported = True  # whether it has ended after its last step
        self._checked: int | None = None  # the epoch whose first step was compared
        self._indices: list[Tensor] = []  # of the epoch's steps since the last flush
        self._parts = EpochParts()
        self._largest_batch = 0
        self._moved_layers: set[int] = set()  # layers that another optimizer moves
        self._open_step: UpdateHooks | None = None  # until the step is recorded
        self._step_count = 0
        self._resumes = False  # whether a state was loaded, and no step followed yet
        self._resumed_at: list[int] = []  # epochs of the first step after each resume
        self._keeps_steps = keep_steps
        self.steps: list[RecordedStep] = []
        """The steps so far, under `keep_steps`."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers, in forward order once a step was recorded."""
        return tuple(self._capture.layers[i] for i in self._capture.tensors.forward_order)

    @contextmanager
    def step(
        self, index: Index | Sequence[Index], *, epoch: int
    ) -> Iterator[Callable[[Index], None]]:
        """Record the training step run inside the block.

        The block may pass forward and backward to the optimizer as a closure that is called once.

        Parameters
        ----------
        index
            Permanent index of each sample of the batch, shape (N,), in the order of its rows. If
            gradients of several backward passes are accumulated, a list with the index of each.
        epoch
            The epoch of the step. If an epoch uses a sample twice, its importances are summed.

        Yields
        ------
        Callable
            Call it with the index of a further backward pass, before that pass's forward pass, if
            the index is not known when the step begins.

        Raises
        ------
        ConfigError
            An index appears twice or is negative.
        UnsupportedError
            As for the class, or the block makes no update or more than one.
        """
        passes = [check_index(pass_index) for pass_index in split_passes(index)]
        index_N = passes[0] if len(passes) == 1 else check_index(torch.cat(passes))

        def add_pass(index: Index) -> None:
            nonlocal index_N
            with torch._C.DisableTorchFunction():
                added = check_index(index)
                whole_N = check_index(torch.cat([index_N, added]))
                self._capture.add_pass(added)
                index_N = whole_N

        if epoch != self._epoch:
            self._parts.require_open(epoch)
            self.end_epoch()
            self._flush()
            self._epoch = epoch
        device = self._capture.tensors.parameters[0].device
        before = RandomState.now(device) if self._keeps_steps else None
        hooks = self._open_step = UpdateHooks(
            self.optimizer, self._capture, self._derivative, keeps_settings=self._keeps_steps
        )
        with (
            hooks,
            self._capture.step(
                [len(pass_index) for pass_index in passes],
                elementwise=self._derivative.elementwise,
                first_of_epoch=epoch != self._checked,
                indices=passes,
            ),
        ):
            yield add_pass
        if hooks.updates == 0 and self._capture.checks.overflowed():
            self._capture.finish({})  # a GradScaler skips such a step: nothing was updated
        elif hooks.updates != 1:
            raise UnsupportedError(
                expected="one optimizer.step() in the block",
                got=f"{hooks.updates}",
                where=f"epoch {epoch}",
                todo="put exactly one update into the block",
            )
        else:
            self._checked = epoch
        for kind, moved in hooks.moved_by.items():
            _leave_out(self, kind, moved)
        self._capture.norms.accept()
        if before is not None and hooks.updates:
            _keep_step(self, epoch, hooks.settings, before)
        self._indices.append(index_N)
        self._is_reported = False
        self._largest_batch = max(self._largest_batch, len(index_N))
        self._step_count += 1
        if self._resumes:
            self._resumed_at.append(epoch)
        self._open_step, self._resumes = None, False

    def end_epoch(self) -> None:
        """Call `on_epoch` with the epoch of the last step, unless it has seen all its steps.

        A step of another epoch ends an epoch, and so do `to_dataset` and `pop_epoch`; call it to
        see the last epoch before. If steps of an epoch follow after its end, it is reported again
        as a whole. An exception of `on_epoch` reaches the caller. The steps themselves do no more
        work than without `on_epoch`.
        """
        epoch, is_reported = self._epoch, self._is_reported
        self._is_reported = True  # before the call, which may read or forget the epoch
        if self._on_epoch is None or is_reported or epoch is None:
            return
        self._flush()
        dataset = _dataset(self, [epoch], self._parts.count_samples()).isel(epoch=0)
        dataset["coverage"] = dataset["importance"].notnull().any("layer").mean("sample")
        dataset["coverage"].attrs = {"units": "1", "long_name": "share of samples with importance"}
        self._on_epoch(epoch, dataset)

    def pop_epoch(self, epoch: int, sample_count: int) -> Tensor:
        """Return an epoch's importance on the CPU and forget it.

        Returns
        -------
        Tensor of shape (layer, sample)
            In parameter squared; NaN for a sample that no step of the epoch used.

        Raises
        ------
        KeyError
            No step of the epoch was recorded, or its importance was popped already.
        ConfigError
            A step named a sample beyond `sample_count`.
        """
        self.end_epoch()
        self._flush()
        summed = self._parts.summed(epoch, sample_count)
        self._parts.forget(epoch)
        if epoch == self._epoch:
            self._epoch = self._checked = None  # its next step is checked as an epoch's first one
        return summed[self._capture.tensors.forward_order]

    def _flush(self) -> None:
        """Turn the norms of the steps so far into importance."""
        if self._indices and self._epoch is not None:
            self._parts.add(self._epoch, torch.cat(self._indices), self._capture.norms.take())
            self._indices = []

    def to_dataset(self, sample_count: int | None = None) -> "xr.Dataset":
        """Return the recorded importance as a labelled Dataset.

        Parameters
        ----------
        sample_count
            Size of the training set. Default: the largest index recorded, plus one.

        Returns
        -------
        xarray.Dataset
            `importance` (epoch, layer, sample), float32, in parameter squared. It is NaN where an
            epoch did not use a sample, and where a sample's gradient was not finite
            (`not_finite_epochs` in the attrs). `to_zarr` of the Dataset writes it to disk.

        Raises
        ------
        ConfigError
            A step named a sample beyond `sample_count`.
        """
        self.end_epoch()
        self._flush()
        count = self._parts.count_samples() if sample_count is None else sample_count
        return _dataset(self, self._parts.epochs, count)

    def state_dict(self, sample_count: int | None = None) -> dict[str, Any]:
        """Return all that was recorded, for a checkpoint; `torch.load` reads it as `weights_only`.

        It has the importance of each epoch that was not popped (so its size is that of the
        result), what the result says of it, and the digest of the model's present parameters.

        Parameters
        ----------
        sample_count
            Size of the training set, which `load_state_dict` compares.

        Raises
        ------
        ConfigError
            A step has made its update, and is not recorded: its block has not ended, or has failed.
        """
        with torch._C.DisableTorchFunction(), torch.no_grad():  # a step may be under way
            return recorder_state(self, sample_count)

    def load_state_dict(self, state: Mapping[str, Any], sample_count: int | None = None) -> None:
        """Go on from a state, bit for bit; the model is loaded first, from the same checkpoint.

        `resumed_at_epoch` in the attrs of the result has the epoch of the first step that follows.
        `on_epoch` is not called again for epochs that had ended.

        Raises
        ------
        ConfigError
            The state is of another network, kind of optimizer, `loss_reduction`, `keep_steps` or
            `sample_count`; of a time when the parameters had other values; or this recorder has
            steps already.
        """
        restore_recorder(self, state, sample_count)


def _keep_step(
    recorder: ImportanceRecorder, epoch: int, settings: Mapping[str, Any], before: RandomState
) -> None:
    """Keep what the finished step was made of."""
    steps, capture = recorder.steps, recorder._capture
    if steps and steps[-1].training == settings["training"]:
        settings = {**settings, "training": steps[-1].training}  # one set for all steps
    steps.append(
        RecordedStep(
            epoch=epoch,
            passes=[index.cpu().numpy() for index in capture.indices],
            **settings,
            random_state=None if before.equals(RandomState.now(before.device)) else before,
            is_scaled=any(float(factor) != 1 for _, _, factor in capture.checks.scales),
        )
    )


def _leave_out(recorder: ImportanceRecorder, kind: str, moved: Sequence[Tensor]) -> None:
    """Record NaN for layers that another optimizer moved in the step, and warn once."""
    capture = recorder._capture
    layers = sorted(capture.norms.leave_out(moved) - recorder._moved_layers)
    recorder._moved_layers.update(layers)
    if layers:
        names = ", ".join(capture.layers[layer] for layer in layers)
        warnings.warn(
            f"{kind} also updates {names}, which the recorder of "
            f"{type(recorder.optimizer).__name__} ignores: their importance is NaN; make a "
            "recorder for each optimizer, or call its step() outside the block",
            stacklevel=4,
        )


def _dataset(
    recorder: ImportanceRecorder, epochs: Sequence[int], sample_count: int
) -> "xr.Dataset":
    """Return epochs as a labelled Dataset."""
    order, attrs = recorder._capture.tensors.forward_order, _recording_attrs(recorder)
    summed = (recorder._parts.summed(epoch, sample_count) for epoch in epochs)
    values = [beta[order].float().numpy() for beta in summed]
    return importance_dataset(values, epochs, recorder.layers, sample_count, attrs)


def _recording_attrs(recorder: ImportanceRecorder) -> dict[str, object]:
    """Return how importance was recorded."""
    rates = sorted({float(group["lr"]) for group in recorder.optimizer.param_groups})
    undefined = recorder._capture.norms.undefined_layers
    return {
        "learning_rate": rates[0] if len(rates) == 1 else rates,
        "batch_size": recorder._largest_batch,
        "loss_reduction": recorder.loss_reduction,
        "weight_decay": float(recorder.optimizer.param_groups[0].get("weight_decay", 0.0)),
        "optimizer": type(recorder.optimizer).__name__,
        "loss": recorder._capture.loss,
        "not_finite_epochs": recorder._parts.not_finite(len(recorder._capture.layers), undefined),
        "resumed_at_epoch": list(recorder._resumed_at),
    }
