"""One training step: its forward and backward passes, from the first call to the update.

    a pass begins              `watch` records forward calls
    the user calls backward()  `known_layouts` proves the row-to-sample mapping, or has it already
    output gradients arrive    `backward` forms per-sample gradients, by one rule per operation
    the pass ends              `buffer` receives the squared norms
    before the update          `gradient_checks` compares the gradients with those of the passes
    after the update           `buffer` completes the norms with d(update)/d(gradient)

Map: `Capture`, which puts these parts together.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from sampimp.config import check_choice
from sampimp.errors import UnsupportedError
from sampimp.importance.backward import BackwardHooks
from sampimp.importance.buffer import StepNorms
from sampimp.importance.forward_pass import ForwardPass
from sampimp.importance.gradient_checks import GradientChecks
from sampimp.importance.gradients import Factor
from sampimp.importance.known_layouts import KnownLayouts
from sampimp.importance.model_tensors import ModelTensors, require_recordable
from sampimp.importance.ownership.data_rows import DataRows
from sampimp.importance.ownership.row_keeping import RowKeeping
from sampimp.importance.rules.batch import Batch
from sampimp.importance.signature import OperationSignature
from sampimp.importance.update import Derivative
from sampimp.importance.watch import ForwardWatch


class Capture:
    """Records one step: squared norms of per-sample gradients for every parameter.

    Parameters
    ----------
    model
        Any network that treats each sample of a batch on its own.
    batch_dim
        Axis of the samples in tensors that also have positions: 0, or 1 where positions come first.
    batch_norm
        What to do with a BatchNorm in training mode, which mixes the samples: raise an error
        ("refuse"), or record no importance (NaN) for it and for the layers called before it
        ("undefined").
    coupled_loss
        What to do with a loss that is no sum over samples: raise an error ("refuse"), or take its
        derivative with respect to each sample's outputs as a constant of the step ("constant").

    Raises
    ------
    UnsupportedError
        The model is wrapped, compiled or scripted, or has a BatchNorm that is to be refused.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        batch_dim: int = 0,
        batch_norm: str = "refuse",
        coupled_loss: str = "refuse",
    ) -> None:
        check_choice(batch_norm, ("refuse", "undefined"), "batch_norm")
        check_choice(coupled_loss, ("refuse", "constant"), "coupled_loss")
        require_recordable(model, batch_norm)
        self._batch_dim = batch_dim
        self.tensors = ModelTensors(model)
        self.checks = GradientChecks(self.tensors)
        self._keeping = RowKeeping()
        self.norms = StepNorms(self.tensors)
        self.indices: list[Tensor] = []
        """Sample indices of each pass of the step."""
        self._layouts = KnownLayouts(self.tensors, coupled_loss)
        self._backward = BackwardHooks(
            self.tensors,
            self.checks,
            self._layouts,
            begin=self._begin_backward,
            keep_sources=self.norms.keep_sources,
        )
        self.watch = ForwardWatch(self.tensors, self.checks, self._backward, batch_norm)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers, in the order of registration."""
        return self.tensors.layers

    @property
    def loss(self) -> str:
        """`SUM`, `UNCHECKED` or `COUPLED` of `sampimp.importance.ownership.coupling`.

        The weakest finding of all proofs so far.
        """
        return self._layouts.loss

    @loss.setter
    def loss(self, finding: str) -> None:
        self._layouts.loss = finding

    @contextmanager
    def step(
        self,
        sizes: Sequence[int],
        *,
        elementwise: bool = False,
        accumulates: bool = True,
        first_of_epoch: bool = False,
        indices: Sequence[Tensor] = (),
    ) -> Iterator[None]:
        """Record the passes that are run inside the block.

        Parameters
        ----------
        sizes
            Number of samples in each backward pass.
        elementwise
            Keep factors until `finish`, because D is known only after the update.
        accumulates
            Whether the passes put their gradients into `.grad`.
        first_of_epoch
            Check the model's parameters, compare the sum of the per-sample gradients with the
            batch's gradient, and prove the row-to-sample mapping again.
        indices
            Sample indices of each pass.
        """
        self._sizes, self.indices = list(sizes), list(indices)
        self._first_of_epoch = first_of_epoch
        self._elementwise, self._accumulates = elementwise, accumulates
        if first_of_epoch:
            self.tensors.require_same_parameters()
            self.tensors.find_buffers()
            self._layouts.begin_epoch()
        self.checks.begin_step(first_of_epoch)
        self.norms.begin_step(sum(self._sizes))
        self._backward.begin_step(elementwise)
        self._done = 0  # passes
        self._step_key = object()  # marks the data tensors that were noted in this step
        self._begin_pass()
        handle = self.tensors.model.register_forward_hook(self.watch.record_outputs)
        with self.watch:
            try:
                yield
            finally:
                handle.remove()
                self.checks.forget_gradients()
                self._calls.clear()
                self._backward.end_step()
                self.watch.resume()

    def add_pass(self, index: Tensor) -> None:
        """Expect one more pass, over these samples, which begins now."""
        if self._done != len(self._sizes):
            raise UnsupportedError(
                expected=f"{len(self._sizes)} backward passes before one more batch",
                got=f"{self._done}",
                where="the step",
                todo="call the model once for each batch, then backward()",
            )
        self._sizes.append(len(index))
        self.indices.append(index)
        self.norms.grow(sum(self._sizes))
        self._begin_pass()

    def _begin_pass(self) -> None:
        start = sum(self._sizes[: self._done])
        size = self._sizes[self._done] if self._done < len(self._sizes) else 0
        samples = slice(start, start + size)
        batch = Batch(size, self._batch_dim, self.tensors.varies)
        index = self.indices[self._done] if self._done < len(self.indices) else None
        self._calls = ForwardPass(
            number=self._done,
            samples=samples,
            batch=batch,
            data=DataRows(
                batch,
                index,
                self._step_key,
                self._keeping,
                samples,
                sum(self._sizes),
                compares=self._first_of_epoch,
            ),
            signature=OperationSignature(self.tensors.rows),
        )
        self.watch.begin_pass(self._calls)
        self._backward.begin_pass(self._calls)

    def _begin_backward(self) -> None:
        """Check the gradients before a backward pass, and register `_end_pass` for its end."""
        if self._done == len(self._sizes):
            raise UnsupportedError(
                expected=f"{self._done} backward passes in the step",
                got="another backward pass",
                where="the step",
                todo="add the losses up before backward(), or pass one index per backward pass: "
                "step([index_1, index_2], ...)",
            )
        if self._accumulates:
            self.checks.require_fresh(is_first_pass=not self._done)
        # As data-parallel training does: one call, not a hook on each parameter.
        Variable._execution_engine.queue_callback(self._end_pass)

    def _end_pass(self) -> None:
        factors, values = self._backward.end_pass()
        with torch._C.DisableTorchFunction(), torch.no_grad():
            if self._elementwise:
                self.norms.keep(self._calls.samples, factors)
            else:
                norms = {row: factor.square() for row, factor in factors.items()}
                self.norms.write(self._calls.samples, values | norms)
        self._done += 1
        self.checks.end_pass(sum(self._sizes[: self._done]))
        self._begin_pass()

    def check(self) -> None:
        """Check the gradients before the update.

        Raises
        ------
        UnsupportedError
            Backward passes are missing, or gradients are not those that the passes have made.
        """
        self._require_all_passes()
        self.checks.require_unchanged()

    def _require_all_passes(self) -> None:
        if self._done != len(self._sizes):
            raise UnsupportedError(
                expected=f"{len(self._sizes)} backward passes before the update",
                got=f"{self._done}",
                where="the step",
                todo="put forward, backward and update into the block, and pass one index per "
                "backward pass: step([index_1, index_2], ...)",
            )

    def take_factors(self) -> list[dict[int, Factor]]:
        """Return the factors of each pass by row of the parameter, in place of `finish`.

        To be called after an `elementwise` step without an update. Graphs that its passes have
        created (`create_graph`) may be differentiated again after the block.

        Raises
        ------
        UnsupportedError
            Backward passes are missing.
        """
        self._require_all_passes()
        return self.norms.take_factors()

    def finish(self, derivatives: Mapping[int, Derivative]) -> None:
        """Complete the step's norms after its update.

        Parameters
        ----------
        derivatives
            d(update)/d(gradient), by id of the parameter. Empty if no update was made.
        """
        checks = self.checks
        self.norms.finish(derivatives, checks.scales, checks.used, checks.undefined)
