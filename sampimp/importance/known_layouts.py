"""Layouts of the samples in each use of a pass, proved once and reused for equal passes.

A proof costs several backward passes (`sampimp.importance.ownership.proof`), so its result is kept
by the signature of the pass. Each signature is proved anew once an epoch, and in every step in
which its result could be another one: samples that move by value, an ambiguous layout, a parameter
that is all zero.

Map: `KnownLayouts`.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sampimp.errors import UnsupportedError
from sampimp.importance.forward_pass import ForwardPass
from sampimp.importance.model_tensors import ModelTensors
from sampimp.importance.ownership.coupling import COUPLED, SUM, UNCHECKED
from sampimp.importance.ownership.layout import AxisLayout
from sampimp.importance.ownership.passes import is_proved_now
from sampimp.importance.ownership.proof import Proof, ProofResult
from sampimp.importance.ownership.use import Use
from sampimp.importance.rules.batch import Batch

Layouts = list[AxisLayout | None]
"""Layout of each use; None where the use has no gradient."""

_MOST_PROOFS_OF_ZEROS = 8
"""Most steps that are proved because a parameter is zero; arbitrary. Some stay zero for ever."""


class KnownLayouts:
    """The results of proofs, by the signature of the pass.

    Parameters
    ----------
    tensors
        The model's parameters.
    coupled_loss
        "refuse" or "constant", see `ImportanceRecorder`.
    """

    def __init__(self, tensors: ModelTensors, coupled_loss: str) -> None:
        self._tensors, self._coupled_loss = tensors, coupled_loss
        self.loss = SUM
        """`SUM`, `UNCHECKED` or `COUPLED`: the weakest finding about the loss so far."""
        self._results: dict[Any, ProofResult] = {}
        self._fresh: set[Any] = set()  # signatures that were proved in this epoch
        self._proof: Proof | None = None  # while it runs

    def begin_epoch(self) -> None:
        """Require each signature to be proved anew; forget those not met in the last epoch."""
        self._results = {key: self._results[key] for key in self._fresh}
        self._fresh.clear()

    def take_proof_gradients(
        self, calls: ForwardPass, use: Use, gradients: Sequence[Tensor | None]
    ) -> bool:
        """Pass output gradients to the proof that produced them; return whether there is one.

        The proof may also be that of another recorder, which gets the gradients itself.
        """
        if self._proof is not None:
            self._proof.take_gradients(use, gradients)
            return True
        edges = calls.edges[use.position] if use.position < len(calls.edges) else []
        return bool(edges) and is_proved_now(edges[0][0])

    def find(
        self, calls: ForwardPass, roots: Sequence[Tensor], gradients: Sequence[Tensor | None]
    ) -> tuple[Layouts | None, Tensor | None]:
        """Return the layouts of a pass's uses, from an earlier step or by a proof.

        Parameters
        ----------
        calls
            The forward pass.
        roots, gradients
            The tensors on which `backward` is called, and the gradients passed to it.

        Returns
        -------
        layouts
            None if no gradient reaches any use.
        order
            Sample of each row of the loss, (N,); None if that is the batch's order.
        """
        key = calls.signature.value, calls.signature.settings(roots, False)
        known = self._results.get(key)
        moves = calls.moves or calls.labels.are_reordered
        holds = known is not None and _fits(known, calls) and known.complete
        if known is not None and holds and key in self._fresh and not moves:
            return known.layouts, None
        if calls.batch.size < 2:
            return self._of_at_most_one_sample(calls), None
        result = self._prove(calls, roots, gradients)
        if result is None:
            return None, None
        self._complete(result, known, calls)
        self._results[key] = result
        self._fresh.add(key)
        self.loss = max(self.loss, result.loss, key=(SUM, UNCHECKED, COUPLED).index)
        return result.layouts, result.order

    def _prove(
        self, calls: ForwardPass, roots: Sequence[Tensor], gradients: Sequence[Tensor | None]
    ) -> ProofResult | None:
        """Run a proof, and leave the gradients that the user keeps as they are."""
        self._proof = Proof(
            calls.uses,
            calls.edges,
            calls.outputs,
            calls.batch,
            self._tensors.model,
            lambda use: self._tensors.place(min(use.roots)),
            calls.tape,
            calls.labels,
            self._coupled_loss,
        )
        kept = [tensor.grad for tensor in calls.retained]
        try:
            return self._proof.run(roots, gradients)
        finally:
            self._proof = None
            for tensor, gradient in zip(calls.retained, kept, strict=True):
                tensor.grad = gradient

    def _of_at_most_one_sample(self, calls: ForwardPass) -> Layouts:
        """Return the layouts of a pass over at most one sample, from a larger pass if known."""
        results = self._results.values()
        alike = (result for result in results if _fits(result, calls) and not result.varies)
        known = next(alike, None)
        layouts = known.layouts if known is not None else [None] * len(calls.uses)
        return [
            layout or self._expected_layout(use, calls.batch)
            for use, layout in zip(calls.uses, layouts, strict=True)
        ]

    def _expected_layout(self, use: Use, batch: Batch) -> AxisLayout:
        """Return the layout of a use in a pass over at most one sample, which has no proof."""
        shape = use.rows_shape
        if not shape:
            raise UnsupportedError(
                expected=f"{batch.size} samples on axis 0 of a layer's input",
                got=f"an output of shape {use.shapes[0]}",
                where=self._tensors.place(min(use.roots)),
                todo="give the samples an axis, also where there is only one sample",
            )
        axes = use.axes(batch)
        axis = next((axis for axis in axes if shape[axis] == batch.size), axes[0])
        return AxisLayout(axis, "outer" if batch.size else "plain")

    def _complete(self, result: ProofResult, known: ProofResult | None, calls: ForwardPass) -> None:
        """Set whether a result holds for later steps, given that of earlier equal passes."""
        if known is not None:
            result.count += known.count
            # Once the layouts have differed, only a proof can tell what they are.
            result.varies = known.varies or any(
                layout is not None
                and before is not None
                and (layout.axis, layout.kind) != (before.axis, before.kind)
                for layout, before in zip(result.layouts, known.layouts, strict=False)
            )
        result.varies |= any(
            layout is not None and layout.kind == "listed" for layout in result.layouts
        )
        # A parameter that is zero (a gate, a head, a bias) hides mixing below it until it moves.
        used = {row for use in calls.uses for row in use.roots}
        zero = any(not bool(self._tensors.parameters[row].detach().any()) for row in used)
        result.complete &= not result.varies and (not zero or result.count >= _MOST_PROOFS_OF_ZEROS)


def _fits(result: ProofResult, calls: ForwardPass) -> bool:
    """Return whether a pass can have the layouts of an earlier one."""
    return len(result.layouts) == len(calls.uses) and all(
        layout is None or layout.fits(use.rows_shape, calls.batch.size)
        for use, layout in zip(calls.uses, result.layouts, strict=True)
    )
