"""Prove, before a backward pass, which sample each row of each use's output belongs to.

    for each candidate for the cut:                                             (`cut`)
        for each pattern of signs on the samples, and one of weights:           (`signs`)
            run backward with those signs at the cut, down to the uses' outputs (`passes`)
        read the owner of each row; refuse rows that depend on several samples
        find layouts that agree with the owners                                 (`layout`)
        find the sample of each row of the loss from the data                   (`loss_order`)
        refuse a loss that is not a sum over samples above the cut              (`coupling`)
    the first candidate without a refusal is the proof; if there is none, raise the first refusal
    of a cut that is not a guess

The definitions and the argument are in `sampimp.importance.ownership`. A proof leaves gradients,
buffers, random states and the graph as they were.

Map: `Proof`, `ProofResult`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from sampimp.errors import UnsupportedError
from sampimp.importance.ownership import refusals
from sampimp.importance.ownership.coupling import SUM, CoupledLossError, loss_kind
from sampimp.importance.ownership.cut import BackwardGraph, Cut, CutEdge, nodes_below
from sampimp.importance.ownership.layout import (
    NO_GRADIENT,
    NOT_FINITE,
    OUTSIDE_CUT,
    SEVERAL_SAMPLES,
    AxisLayout,
    layouts_of,
    owners_on_axis,
    sequence_owners,
)
from sampimp.importance.ownership.loss_order import LabelOrders, LossOrder
from sampimp.importance.ownership.passes import SignPasses, announced
from sampimp.importance.ownership.tape import Tape
from sampimp.importance.ownership.use import Use
from sampimp.importance.rules.batch import Batch
from sampimp.importance.rules.recurrent_call import is_batch_first, packed_sequences
from sampimp.importance.rules.registry import looks_inside

MOST_AXES = 5
"""Number of axes that are tried where no tensor has samples on the expected axis; arbitrary."""


@dataclass
class ProofResult:
    """The result of all proofs for one sequence of operations."""

    layouts: list[AxisLayout | None]
    """Layout of each use; None where no gradient arrived."""
    order: Tensor | None
    """Sample of each row of the loss, (N,), where that is not the batch's order."""
    complete: bool
    """Whether it holds for later steps: every use had a gradient, and only one layout fits."""
    loss: str
    """`SUM`, `COUPLED` or `UNCHECKED` (`sampimp.importance.ownership.coupling`)."""
    count: int = 1
    """How many steps were proved."""
    varies: bool = False
    """Whether layouts have differed between steps."""


class Proof:
    """The proof of one backward pass.

    Parameters
    ----------
    uses
        Uses of the pass, in the order of their calls.
    edges
        For each use, the nodes of its watched outputs, each with the number of the node's output.
    outputs
        The outputs of the model on which the samples' axis is known, by node and number.
    batch
        The samples of the pass.
    model, coupled_loss
        Arguments of the recorder.
    where
        Returns the layer of a use, for messages.
    tape
        The operations of the loss.
    labels
        The orders of the data that it compares outputs with.
    """

    def __init__(
        self,
        uses: Sequence[Use],
        edges: Sequence[Sequence[tuple[Node, int]]],
        outputs: Mapping[tuple[Node, int], AxisLayout],
        batch: Batch,
        model: nn.Module,
        where: Callable[[Use], str],
        tape: Tape,
        labels: LabelOrders,
        coupled_loss: str,
    ) -> None:
        self._uses, self._edges, self._outputs = uses, edges, outputs
        self._batch, self._model, self._where = batch, model, where
        self._tape, self._labels, self._coupled_loss = tape, labels, coupled_loss
        self._passes: SignPasses  # of the cut that is tried now
        self._is_finite = True

    def take_gradients(self, use: Use, gradients: Sequence[Tensor | None]) -> None:
        """Take the output gradients of a use in the pass that runs now; called by hooks."""
        self._passes.take(use, gradients)

    def run(
        self, roots: Sequence[Tensor], gradients: Sequence[Tensor | None]
    ) -> ProofResult | None:
        """Return how samples lie in all uses; None where no gradient arrives at any use.

        Parameters
        ----------
        roots, gradients
            The tensors on which `backward` is called, with the gradients passed to it.

        Raises
        ------
        UnsupportedError
            Samples are mixed, or the samples of rows cannot be found.
        CoupledLossError
            The loss is not a sum over samples.
        """
        nodes = {node for edges in self._edges for node, _ in edges}
        starts = [(root.grad_fn, root.output_nr) if root.grad_fn else None for root in roots]
        graph = BackwardGraph(starts, nodes)
        reached = [edges[0][0] in graph.leads_to_watched for edges in self._edges]
        if not any(reached):
            return None
        first_refusal: UnsupportedError | None = None
        with announced(graph):
            for cut in self._cuts(graph, nodes):
                try:
                    return self._prove(graph, cut, reached, roots, gradients)
                except CoupledLossError:
                    raise  # another cut, nearer to the loss, could only hide the coupling
                except UnsupportedError as error:
                    if not any(map(self._is_guess, cut.edges)):
                        first_refusal = first_refusal or error
        raise first_refusal or self._no_samples_above(self._uses[-1])

    # Where to cut.

    def _cuts(self, graph: BackwardGraph, nodes: set[Node]) -> Iterator[Cut]:
        """Yield candidates: the model's outputs, then the first edges with an axis of N."""
        if self._outputs:
            cut = graph.cut(lambda node, number: self._outputs.get((node, number)))
            if cut.edges and not cut.above & (nodes | nodes_below(cut.edges)):
                yield cut
        guesses = [AxisLayout(0, "outer"), AxisLayout(0, "inner")]
        guesses += [AxisLayout(axis, "plain") for axis in range(MOST_AXES)]
        tried: list[set[tuple[Node, int]]] = []
        for fewest_axes in (1, 2):  # the only axis of a vector of length N may be one of classes
            for guess in guesses:
                cut = graph.cut(self._layout_at(nodes, guess, fewest_axes))
                places = {(edge.node, edge.number) for edge in cut.edges}
                is_new = any(map(self._is_guess, cut.edges)) or places not in tried
                tried.append(places)
                if cut.edges and is_new:
                    yield cut
                if not any(map(self._is_guess, cut.edges)) and not cut.above & nodes:
                    break

    def _layout_at(
        self, nodes: set[Node], guess: AxisLayout, fewest_axes: int
    ) -> Callable[[Node, int], AxisLayout | None]:
        """Return which edges belong to a cut: those with an axis of N where it is expected.

        Where the way down to a use meets none, the cut is at the use's output. That may have
        samples and positions joined, or its samples on another axis: a guess, which holds only if
        the data of a use below confirm it.
        """
        size = self._batch.size

        def layout_at(node: Node, number: int) -> AxisLayout | None:
            shape = tuple(node._input_metadata[number].shape)
            plain = AxisLayout(self._batch.axis(len(shape), 1), "plain")
            if len(shape) >= fewest_axes and plain.fits(shape, size):
                return plain
            return guess if node in nodes and guess.fits(shape, size) else None

        return layout_at

    def _is_guess(self, edge: CutEdge) -> bool:
        ndim = len(edge.node._input_metadata[edge.number].shape)
        return edge.layout.kind != "plain" or edge.layout.axis != self._batch.axis(ndim, 1)

    # The proof at one cut.

    def _prove(
        self,
        graph: BackwardGraph,
        cut: Cut,
        reached: Sequence[bool],
        roots: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
    ) -> ProofResult:
        """Return the result of the proof at one cut, or raise the error that it leads to."""
        self._is_finite = True
        self._passes = SignPasses(self._uses, self._edges, self._model, self._batch.size)
        self._passes.run(graph, cut, roots, gradients)
        layouts: list[AxisLayout | None] = []
        all_known = True
        for use, is_reached in zip(self._uses, reached, strict=True):
            layout, is_known = self._layout(use) if is_reached else (None, True)
            layouts.append(layout)
            all_known &= is_known
        order = self._order_of_loss(layouts, cut)
        if not self._labels.agree_with(order):
            raise refusals.labels_disagree(self._uses[-1], self._where(self._uses[-1]))
        loss = SUM
        if self._is_finite:
            loss = loss_kind(
                cut,
                roots,
                gradients,
                size=self._batch.size,
                tape=self._tape,
                model=self._model,
                coupled_loss=self._coupled_loss,
            )
        return ProofResult(layouts, order, order is None and all_known, loss)

    def _layout(self, use: Use) -> tuple[AxisLayout | None, bool]:
        """Return how samples lie in a use, and whether no other layout fits.

        The layout is None where the use's gradient is zero, or where it has no importance.
        """
        if not use.rows_shape:
            raise self._misplaced(use)
        size, axes = self._batch.size, use.axes(self._batch)
        owners = self._passes.owners(use)
        is_finite = not _any_is(owners, NOT_FINITE)
        if use.exempt:
            return None, True
        self._is_finite &= is_finite
        if not is_finite:  # importance is not finite either, whatever the layout
            rows = torch.full(use.rows_shape, NO_GRADIENT)
            possible = (
                layout for layout in layouts_of(rows, axes, size) if layout.kind != "listed"
            )
            return next(possible, None), False
        if _any_is(owners, SEVERAL_SAMPLES):
            raise refusals.samples_mixed(use, self._where(use))
        if _any_is(owners, OUTSIDE_CUT):
            raise self._no_samples_above(use)
        row_owners = self._row_owners(use, owners)
        if row_owners is None:
            raise self._misplaced(use)
        if bool((row_owners == NO_GRADIENT).all()):
            return None, False
        fitting = list(layouts_of(row_owners, axes, size))
        if use.data is not None and not looks_inside(use.function):
            fitting = [layout for layout in fitting if layout.axis == use.data.axis]
        if not fitting:
            raise self._misplaced(use)
        # Where few rows have a gradient several layouts may fit; later proofs decide.
        is_only = sum(layout.kind != "listed" for layout in fitting) == 1
        return fitting[0], is_only

    def _row_owners(self, use: Use, owners: Sequence[Tensor]) -> Tensor | None:
        """Return the owners of rows; of a recurrent layer those of sequences, or None."""
        if not looks_inside(use.function):
            return owners[0]
        packed = packed_sequences(use.args, use.kwargs)
        batch_first = is_batch_first(use.function, use.args, use.kwargs)
        return sequence_owners(owners, use.rows_shape[0], packed, batch_first)

    # Which sample each row of the loss belongs to.

    def _order_of_loss(self, layouts: Sequence[AxisLayout | None], cut: Cut) -> Tensor | None:
        """Return the sample of each row of the loss, from the data; None for the batch's order."""
        order = LossOrder(self._batch.size)
        with_data: list[Use] = []  # uses whose data have named samples
        for use, layout in zip(self._uses, layouts, strict=True):
            if use.data is None or (layout is None and not use.exempt):
                continue
            samples = use.data.samples
            if samples is None or (use.exempt and not use.data.is_ordered(self._batch.size)):
                raise self._order_unknown(use)
            if layout is None:
                continue
            owners = self._owners_on(use, layout)
            if len(samples) < len(owners):
                continue
            if not order.add(owners, samples[: len(owners)]):
                raise self._order_unknown(use)
            if bool((owners >= 0).any()):
                with_data.append(use)
        self._require_confirmed(cut, with_data)
        if not with_data or order.is_plain:
            return None
        if not order.is_complete:
            raise self._order_unknown(next(use for use in self._uses if use.data is not None))
        return order.samples

    def _require_confirmed(self, cut: Cut, with_data: Sequence[Use]) -> None:
        """Raise unless each guess of the cut has a use with data below, which confirms it."""
        for edge in filter(self._is_guess, cut.edges):
            below = nodes_below([edge])
            if not any(self._edges[use.position][0][0] in below for use in with_data):
                raise self._no_samples_above(self._uses[-1])

    def _owners_on(self, use: Use, layout: AxisLayout) -> Tensor:
        """Return the owner of each row on a layout's axis, (R,), or `NO_GRADIENT`."""
        owners = [
            output_owners.where(output_owners != NOT_FINITE, NO_GRADIENT)
            for output_owners in self._passes.owners(use)
        ]
        rows = self._row_owners(use, owners)
        if rows is not None and not looks_inside(use.function):
            rows = owners_on_axis(rows, layout.axis)
        assert rows is not None  # the layout was made of them
        return rows

    # Refusals.

    def _misplaced(self, use: Use) -> UnsupportedError:
        return refusals.samples_misplaced(use, self._where(use), self._batch)

    def _no_samples_above(self, use: Use) -> UnsupportedError:
        return refusals.no_samples_above(use, self._where(use), self._batch)

    def _order_unknown(self, use: Use) -> UnsupportedError:
        return refusals.order_unknown(use, self._where(use))


def _any_is(owners: Sequence[Tensor], code: int) -> bool:
    return any(bool((output_owners == code).any()) for output_owners in owners)
