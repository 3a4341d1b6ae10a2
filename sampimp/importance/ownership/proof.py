"""Prove, before a backward pass, which sample each row of each use of parameters belongs to.

    find a cut between the loss and the uses       (`sampimp.importance.ownership.layout`)
    for each pattern of signs of the samples, and one of weights:
        go back from the loss with those signs at the cut, to the uses' outputs and no further
    each row was left or negated, and spells its sample by that; or it is of several samples: refuse
    what is above the cut is a sum over samples, by name (`sampimp.importance.ownership.tape`), or
    by its second
    derivative and by changes of the model's outputs: or refuse
    rows whose sample the data say (`sampimp.importance.ownership.rows`) say which sample each row
    of the loss is

Nothing is left behind: gradients, buffers and random states are as before, and the graph too.

Map: `Use` (a forward call with parameters), `ProofResult` (what a proof finds), `Proof`.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from sampimp.errors import UnsupportedError
from sampimp.importance.ownership.layout import (
    NO_GRADIENT,
    NOT_FINITE,
    OUTSIDE_CUT,
    SEVERAL_SAMPLES,
    AxisLayout,
    Cut,
    Edge,
    Graph,
    Signs,
    along,
    couples,
    layouts_of,
    nodes_below,
    sequence_owners,
    side_effects_undone,
    sign_patterns,
    weight_pattern,
)
from sampimp.importance.ownership.rows import SampleRows, is_data
from sampimp.importance.ownership.tape import Tape
from sampimp.importance.rules.arithmetic import LOOKS, Batch
from sampimp.importance.rules.inner_nodes import InnerNodes
from sampimp.importance.rules.recurrent import is_batch_first, packed_sequences

_proving: list[Mapping[Node, bool]] = []
"""The graphs of the proofs that are run now, whose backward passes are no recorder's."""

SUM, COUPLED, UNCHECKED = (
    "sum over samples",
    "coupled: its derivative at each sample's outputs is taken as a constant",
    "not checked: it has no second derivative",
)
"""What a loss is, as far as that is known."""

_WEIGHTS = -1
"""Number of the pass with other weights."""

AXES = 5
"""On how many axes samples are looked for where no output has them as expected; arbitrary."""


class CoupledLossError(UnsupportedError):
    """A loss that is no sum over samples."""


@dataclass(eq=False)
class Use:
    """A forward call with a parameter, or a tensor made of parameters, among its arguments."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    roots: frozenset[int]
    """Which parameters of the model."""
    shapes: Sequence[tuple[int, ...]]
    """Of the watched outputs."""
    features: int
    """How many of the last axes of an output are one row's."""
    data: SampleRows | None
    """Which samples its data are; None where it has activations, or that is not known."""
    number: int
    """Of the pass."""
    position: int
    """Among the uses of the pass."""
    exempt: bool = False
    """Whether it has no importance, being below a BatchNorm in training mode."""
    inner: InnerNodes | tuple[Tensor, int] | None = None
    """Where the rule asks for it: what is inside; else the output, detached (with its hook it would
    be a cycle), and its version."""
    done: bool = False
    """Whether its gradient has come."""

    @property
    def rows_shape(self) -> tuple[int, ...]:
        """Shape of the axes on which samples may be; of a recurrent layer, the sequences' alone."""
        if self.function in LOOKS:
            return self.shapes[-1][-2:-1]
        return self.shapes[0][: len(self.shapes[0]) - self.features]

    def axes(self, batch: Batch) -> list[int]:
        """Return those axes, the one on which samples are expected first."""
        axes = range(len(self.rows_shape))
        expected = batch.axis(len(self.shapes[0]), 1)
        return sorted(axes, key=lambda axis: (axis != expected, axis))


@dataclass
class ProofResult:
    """What the proofs of steps with one sequence of operations found."""

    layouts: list[AxisLayout | None]
    """Of the uses; None where no gradient has come."""
    order: Tensor | None
    """Sample of each row of the loss, (N,), where that is not the batch's order."""
    complete: bool
    """Whether it holds for later steps: each use had a gradient, and lists are not needed."""
    loss: str
    """`SUM`, `COUPLED` or `UNCHECKED`."""
    count: int = 1
    """How many steps were proved."""
    varies: bool = False
    """Whether rows have lain in different ways."""


class Proof:
    """The proof of one backward pass.

    Parameters
    ----------
    uses
        Of the pass, in the order of their calls.
    edges
        Of each use, the nodes of its watched outputs and the numbers of these among theirs.
    outputs
        Outputs of the model on which the samples' axis is known.
    batch, model
        As for the capture.
    where
        Returns the layer of a use, for messages.
    tape
        The operations of the loss.
    coupled_loss
        As for the capture.
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
        coupled_loss: str,
    ) -> None:
        self._uses, self._edges, self._outputs = uses, edges, outputs
        self._batch, self._model, self._where = batch, model, where
        self._tape, self._coupled_loss = tape, coupled_loss
        self._signs: list[list[Signs]] = []
        self._pass: int | None = None
        self._is_finite = True

    def take_gradients(self, use: Use, gradients: Sequence[Tensor | None]) -> None:
        """Take the gradients of a use's outputs in the pass that is run."""
        with torch._C.DisableTorchFunction(), torch.no_grad():
            for signs, gradient in zip(self._signs[use.position], gradients, strict=True):
                self._take(signs, gradient)

    def _take(self, signs: Signs, gradient: Tensor | None) -> None:
        if self._pass == _WEIGHTS:
            signs.weigh(gradient)
        elif self._pass is not None:
            signs.see(gradient, self._pass)

    def run(
        self, roots: Sequence[Tensor], gradients: Sequence[Tensor | None]
    ) -> ProofResult | None:
        """Return whose the rows are; None where no gradient comes to any use.

        Parameters
        ----------
        roots, gradients
            The tensors on which `backward` is called, with the gradients that it is given.

        Raises
        ------
        UnsupportedError
            Samples are mixed; or it cannot be told which rows are theirs.
        """
        nodes = {node for edges in self._edges for node, _ in edges}
        starts = [(root.grad_fn, root.output_nr) if root.grad_fn else None for root in roots]
        graph = Graph(starts, nodes)
        reached = [edges[0][0] in graph.leads for edges in self._edges]
        if not any(reached):
            return None
        with _announced(graph):
            return self._find(graph, nodes, reached, roots, gradients)

    def _find(
        self,
        graph: Graph,
        nodes: set[Node],
        reached: Sequence[bool],
        roots: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
    ) -> ProofResult:
        """Return what the first cut proves at which nothing is against it."""
        refused: UnsupportedError | None = None
        for cut in self._cuts(graph, nodes):
            try:
                return self._prove(graph, cut, reached, roots, gradients)
            except CoupledLossError:
                raise  # another cut, nearer to the loss, could but hide it
            except UnsupportedError as error:
                if not any(map(self._is_guess, cut.edges)):
                    refused = refused or error
        raise refused or self._no_samples()

    def _cuts(self, graph: Graph, nodes: set[Node]) -> Iterator[Cut]:
        """Yield cuts: at the model's outputs, or where the samples' axis is met first."""
        if self._outputs:
            cut = graph.cut(lambda node, number: self._outputs.get((node, number)))
            if cut.edges and not cut.above & (nodes | nodes_below(cut.edges)):
                yield cut
        guesses = [AxisLayout(0, "outer"), AxisLayout(0, "inner")]
        guesses += [AxisLayout(axis, "plain") for axis in range(AXES)]
        tried: list[set[tuple[Node, int]]] = []
        for least in (1, 2):  # one axis of N may also be one of classes
            for guess in guesses:
                cut = graph.cut(self._stop(nodes, guess, least))
                places = {(edge.node, edge.number) for edge in cut.edges}
                is_new = any(map(self._is_guess, cut.edges)) or places not in tried
                tried.append(places)
                if cut.edges and is_new:
                    yield cut
                if not any(map(self._is_guess, cut.edges)) and not cut.above & nodes:
                    break

    def _stop(
        self, nodes: set[Node], guess: AxisLayout, least: int
    ) -> Callable[[Node, int], AxisLayout | None]:
        """Return which edges have an axis of N where it is expected, or else are those of uses.

        These may have samples and positions joined, or the axis elsewhere: a guess, which holds
        only if the data below agree.
        """
        size = self._batch.size

        def stop(node: Node, number: int) -> AxisLayout | None:
            shape = tuple(node._input_metadata[number].shape)
            plain = AxisLayout(self._batch.axis(len(shape), 1), "plain")
            if len(shape) >= least and plain.fits(shape, size):
                return plain
            return guess if node in nodes and guess.fits(shape, size) else None

        return stop

    def _is_guess(self, edge: Edge) -> bool:
        ndim = len(edge.node._input_metadata[edge.number].shape)
        return edge.layout.kind != "plain" or edge.layout.axis != self._batch.axis(ndim, 1)

    def _prove(
        self,
        graph: Graph,
        cut: Cut,
        reached: Sequence[bool],
        roots: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
    ) -> ProofResult:
        self._run_passes(graph, cut, roots, gradients)
        found = [
            self._layout(use) if is_reached else (None, True)
            for use, is_reached in zip(self._uses, reached, strict=True)
        ]
        layouts = [layout for layout, _ in found]
        order = self._order_of_loss(layouts, cut)
        loss = self._loss(cut, roots, gradients) if self._is_finite else SUM
        complete = order is None and all(is_known for _, is_known in found)
        return ProofResult(layouts, order, complete, loss)

    def _loss(self, cut: Cut, roots: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> str:
        """Return what the loss is; raise an error if it couples samples."""
        size = self._batch.size
        # Where the cut is the model's outputs, the loss may be known as a function of them.
        at_outputs = all(self._tape.holds(edge.node, edge.number) for edge in cut.edges)
        if at_outputs and self._tape.is_sum(roots):
            return SUM
        with side_effects_undone(self._model):
            found = couples(cut, roots, gradients, size)
            if at_outputs and found is not True:
                by_change = self._tape.couples(roots, gradients, size)
                found = found if by_change is None else by_change
        if found and self._coupled_loss == "constant":
            return COUPLED
        if found:
            raise CoupledLossError(
                expected="a loss that is a sum over samples, each with outputs of its own",
                got="one that mixes the outputs of several samples, so that they have no parts of "
                "it",
                where="the loss",
                todo="train on a sum or mean of the samples' losses; or say that the loss's "
                'derivative at the outputs is meant as a constant: coupled_loss="constant"',
            )
        if found is None:
            warnings.warn(
                "this loss has no second derivative, so it was not checked that it is a sum over "
                "samples",
                stacklevel=2,
            )
            return UNCHECKED
        return SUM

    def _run_passes(
        self,
        graph: Graph,
        cut: Cut,
        roots: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
    ) -> None:
        """Run the passes, each with other signs."""
        self._is_finite = True
        self._signs = [
            [Signs(shape, len(shape) - use.features) for shape in use.shapes] for use in self._uses
        ]
        # Of uses below others no hook is called, if their gradient is where a pass ends.
        lowest = [
            (signs, GradientEdge(node, number))
            for of_use, edges in zip(self._signs, self._edges, strict=True)
            for signs, (node, number) in zip(of_use, edges, strict=True)
            if node in graph.lowest
        ]
        starts = [
            torch.ones_like(root) if gradient is None else gradient
            for root, gradient in zip(roots, gradients, strict=True)
        ]
        with side_effects_undone(self._model) as undo:
            size = self._batch.size
            passes = [*enumerate(sign_patterns(size)), (_WEIGHTS, weight_pattern(size))]
            for self._pass, sign_N in passes:
                with cut.signs(sign_N):
                    try:
                        found = torch.autograd.grad(
                            list(roots),
                            [edge for _, edge in lowest],
                            list(cut.root_gradients(starts, sign_N)),
                            retain_graph=True,
                            allow_unused=True,
                        )
                    except UnsupportedError:
                        raise
                    except Exception as error:  # of whatever the graph holds
                        raise self._not_repeated(error) from error
                for (signs, _), gradient in zip(lowest, found, strict=True):
                    self._take(signs, gradient)
                undo()
        self._pass = None

    def _layout(self, use: Use) -> tuple[AxisLayout | None, bool]:
        """Return how samples lie in a use, and whether that is all there is to know.

        None where its gradient is zero or does not count.
        """
        if not use.rows_shape:
            raise self._misplaced(use)
        size, axes = self._batch.size, use.axes(self._batch)
        owners = [signs.owners(size) for signs in self._signs[use.position]]
        is_finite = not any(bool((one == NOT_FINITE).any()) for one in owners)
        if use.exempt:
            return None, True
        self._is_finite &= is_finite
        if not is_finite:  # nothing can be told but that importance is not finite either
            rows = torch.full(use.rows_shape, NO_GRADIENT)
            found = (one for one in layouts_of(rows, axes, size) if one.kind != "listed")
            return next(found, None), False
        if any(bool((one == SEVERAL_SAMPLES).any()) for one in owners):
            raise self._mixed(use)
        if any(bool((one == OUTSIDE_CUT).any()) for one in owners):
            raise self._no_samples(use)
        found_rows = self._rows(use, owners)
        if found_rows is None:
            raise self._misplaced(use)
        if bool((found_rows == NO_GRADIENT).all()):
            return None, False
        fitting = list(layouts_of(found_rows, axes, size))
        if use.data is not None and use.function not in LOOKS:
            fitting = [layout for layout in fitting if layout.axis == use.data.axis]
        if not fitting:
            raise self._misplaced(use)
        # With few nonzero rows several layouts may fit; later proofs decide.
        is_only = sum(layout.kind != "listed" for layout in fitting) == 1
        return fitting[0], is_only

    def _rows(self, use: Use, owners: Sequence[Tensor]) -> Tensor | None:
        """Return the owners of rows; of a recurrent layer, of sequences, or None of several."""
        if use.function not in LOOKS:
            return owners[0]
        packed = packed_sequences(use.args, use.kwargs)
        batch_first = is_batch_first(use.function, use.args, use.kwargs)
        return sequence_owners(owners, use.rows_shape[0], packed, batch_first)

    def _order_of_loss(self, layouts: Sequence[AxisLayout | None], cut: Cut) -> Tensor | None:
        """Return the sample of each row of the loss, as the data say; None in the batch's order."""
        size = self._batch.size
        order = torch.full((size,), NO_GRADIENT)
        told: list[int] = []  # uses whose data say which samples they are
        for use, layout in zip(self._uses, layouts, strict=True):
            if use.data is None or (layout is None and not use.exempt):
                continue
            is_ordered = use.data.is_ordered(size)
            if use.data.samples is None or (use.exempt and not is_ordered):
                raise self._lost(use)
            if layout is None:
                continue
            owners = self._row_owners(use, layout)
            samples = use.data.samples[: len(owners)]
            if len(samples) != len(owners):
                continue
            seen = owners >= 0
            if bool((samples[seen] < 0).any()):
                raise self._lost(use)  # rows that are no sample's, with a gradient
            owners, samples = owners[seen], samples[seen]
            before = order[owners]
            if bool(((before != NO_GRADIENT) & (before != samples)).any()):
                raise self._lost(use)
            order[owners] = samples
            if bool((order[owners] != samples).any()):
                raise self._lost(use)  # a row of the loss that is of several samples of the data
            if len(samples):
                told.append(use.position)
        for edge in filter(self._is_guess, cut.edges):
            below = nodes_below([edge])
            if not any(self._edges[position][0][0] in below for position in told):
                raise self._no_samples()
        if not told:
            return None
        plain = torch.arange(size)
        if bool(((order == plain) | (order == NO_GRADIENT)).all()):
            return None
        if len(order.unique()) != size or int(order.min()) < 0:
            raise self._lost(next(use for use in self._uses if use.data is not None))
        return order

    def _row_owners(self, use: Use, layout: AxisLayout) -> Tensor:
        """Return the owner of each row on a layout's axis, (R,), or NO_GRADIENT."""
        owners = [signs.owners(self._batch.size) for signs in self._signs[use.position]]
        owners = [one.where(one != NOT_FINITE, NO_GRADIENT) for one in owners]
        rows = self._rows(use, owners)
        rows = rows if rows is None or use.function in LOOKS else along(rows, layout.axis)
        assert rows is not None  # a layout was found
        return rows

    # Messages.

    def _mixed(self, use: Use) -> UnsupportedError:
        todo = "leave out what mixes them, as a mean over the batch, or attention between samples"
        if use.data is not None or all(map(is_data, use.args)):
            todo += "; make a buffer (register_buffer) of a tensor that depends on no sample"
        return UnsupportedError(
            expected="operations that treat each sample of a batch on its own",
            got=f"an output of {_name(use)} on each row of which several samples depend: something "
            "between it and the loss mixes them",
            where=self._where(use),
            todo=todo,
        )

    def _misplaced(self, use: Use) -> UnsupportedError:
        size, axis = self._batch.size, use.axes(self._batch)[:1]
        return UnsupportedError(
            expected=f"{size} samples on axis {axis[0] if axis else 0}, one for each index of the "
            "step, or joined with positions",
            got=f"an output of {_name(use)} of shape {use.shapes[0]}, with its samples elsewhere",
            where=self._where(use),
            todo="put them there; batch_dim=1 says that positions come before samples",
        )

    def _no_samples(self, use: Use | None = None) -> UnsupportedError:
        size, axis = self._batch.size, self._batch.dim
        use = use or self._uses[-1]
        return UnsupportedError(
            expected=f"{size} samples on axis {axis} of the model's output or of what the loss is "
            "made of, one for each index of the step",
            got=f"none between the loss and a layer whose output has shape {use.shapes[0]}",
            where=self._where(use),
            todo="name as many samples as the batch has, of each part where it comes in parts: "
            "step([index_1, index_2], ...); batch_dim=1 where positions come before samples",
        )

    def _lost(self, use: Use) -> UnsupportedError:
        return UnsupportedError(
            expected="data in the order of the step's index, or put into another order inside by "
            "whole rows",
            got="data whose rows could not be matched with the step's samples",
            where=self._where(use),
            todo="put the batch into its order outside the block",
        )

    def _not_repeated(self, error: Exception) -> UnsupportedError:
        return UnsupportedError(
            expected="a backward pass that can be run several times",
            got=(str(error).strip() or type(error).__name__).splitlines()[0],
            where="the step",
            todo="leave out what forbids it, as checkpoint(use_reentrant=True)",
        )


def is_proved_now(node: Node) -> bool:
    """Return whether a proof is running over a node, so that what comes there is not the user's."""
    return any(node in graph for graph in _proving)


@contextmanager
def _announced(graph: Graph) -> Iterator[None]:
    """Let all recorders know that backward passes over a graph are a proof's."""
    _proving.append(graph.leads)
    try:
        yield
    finally:
        _proving.remove(graph.leads)


def _name(use: Use) -> str:
    return getattr(use.function, "__name__", str(use.function))
