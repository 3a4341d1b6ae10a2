"""Which sample each row of an output gradient belongs to, proved by changes of sign.

The loss of a batch carries a weight v_i on the part of each sample (Gao & Jojic 2017, section 2),
and every output gradient is linear in v. Before the user's backward pass, the gradient is computed
again with some v_i = -1: in pass b, where bit b of i + 1 is set. A change of sign is exact in every
floating-point format, so a row that belongs to one sample comes back bit for bit as it was, or
negated, and the passes in which it was negated spell its sample. Any other row depends on several
samples. A last pass with some v_i = 2 finds gradients that are scaled by the norm of all. This
takes ceil(log2(N + 1)) + 2 passes, which compute no gradient of a parameter.

The signs are applied at the *cut*: the edges of autograd's graph on which the samples' axis is met
first on the way down from the loss, preferably those of the model's outputs. What is above the cut
has to be a sum over samples, which is tested by its second derivative: that of a sum has no entry
that joins two samples.

Map: `Graph` (nodes between the loss and the watched outputs), `Cut` (where signs are applied),
`Signs` (owners by sign, accumulated over the passes), `AxisLayout` (how samples lie on an axis),
`couples` (the second derivative).

Shape suffixes: N samples, R rows of an axis, F features.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

NO_GRADIENT, SEVERAL_SAMPLES, OUTSIDE_CUT, NOT_FINITE = -1, -2, -3, -4
"""Owners that are no sample: a row without gradient; of several samples; not from the cut; not
finite."""

TOLERANCE = 64
"""Multiples of the rounding error eps between two passes that are not bit for bit equal.

Arbitrary; only for devices on which sums are not deterministic.
"""


PASSING = {"_JointOutputsBackward"}
"""Functions of our own that pass gradients on as they are."""

BLOCK = 2**19
"""Values of an output gradient that are projected at once, in float64; arbitrary."""


@dataclass(frozen=True, eq=False)
class AxisLayout:
    """How samples lie along an axis of R rows."""

    axis: int
    kind: str
    """"plain" (R = N, row n is sample n), "outer" (samples, then positions: row r is of sample
    r // (R / N)), "inner" (positions, then samples: r % N), or "listed"."""
    owners: Tensor | None = None
    """Sample of each row, (R,), of a list, which holds for one step only."""

    def fits(self, shape: Sequence[int], size: int) -> bool:
        """Return whether an output of this shape can have N = size samples so."""
        if self.axis >= len(shape):
            return False
        rows = shape[self.axis]
        if self.kind == "plain":
            return rows == size
        return self.kind == "listed" or (size > 0 and rows % size == 0)

    def samples(self, rows: int, size: int) -> Tensor:
        """Return the sample of each row, (R,)."""
        if self.owners is not None:
            return self.owners
        index = torch.arange(rows)
        return index // max(1, rows // size) if self.kind == "outer" else index % size


class Edge(NamedTuple):
    """An edge of autograd's graph on which signs are applied."""

    consumer: Node | None
    """None where the edge is that of a tensor on which `backward` is called."""
    position: int
    """Of the edge among the consumer's, or of the tensor among those of `backward`."""
    node: Node
    number: int
    """Of the output of `node`."""
    layout: AxisLayout


class Graph:
    """The part of autograd's graph from tensors on which `backward` is called to watched outputs.

    Parameters
    ----------
    roots
        The nodes of those tensors, each with the number of its output; None without a gradient.
    watched
        The nodes of the watched outputs.
    """

    def __init__(self, roots: Sequence[tuple[Node, int] | None], watched: Collection[Node]) -> None:
        self.roots, self.watched = roots, watched
        self.leads: dict[Node, bool] = {}
        """Of each node, whether a watched one is at it or below."""
        self.lowest = set(watched)
        """The watched nodes that have no other below."""
        stack = [(root[0], False) for root in roots if root is not None]
        while stack:
            node, done = stack.pop()
            below = [child for child, _ in node.next_functions if child is not None]
            if done:
                above_other = any(self.leads[child] for child in below)
                if above_other:
                    self.lowest.discard(node)
                self.leads[node] = above_other or node in watched
            elif node not in self.leads:
                self.leads[node] = False
                stack.append((node, True))
                stack += [(child, False) for child in below if child not in self.leads]
        self.lowest &= self.leads.keys()

    def cut(self, stop: Callable[[Node, int], AxisLayout | None]) -> "Cut":
        """Return the first edges on the way down for which `stop` names a layout."""
        edges: list[Edge] = []
        above: set[Node] = set()
        waiting: list[Node] = []

        def descend(consumer: Node | None, position: int, node: Node, number: int) -> None:
            if not self.leads[node]:
                return
            layout = stop(node, number)
            if layout is not None:
                edges.append(Edge(consumer, position, node, number, layout))
            elif node not in above:
                above.add(node)
                waiting.append(node)

        for position, root in enumerate(self.roots):
            if root is not None:
                descend(None, position, *root)
        while waiting:
            consumer = waiting.pop()
            for position, (node, number) in enumerate(consumer.next_functions):
                if node is not None:
                    descend(consumer, position, node, number)
        return Cut(edges, above)


def nodes_below(edges: Sequence[Edge]) -> set[Node]:
    """Return the nodes that are reached through edges."""
    found: set[Node] = set()
    waiting = [edge.node for edge in edges]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += [child for child, _ in node.next_functions if child is not None]
    return found


@dataclass
class Cut:
    """Edges that separate the loss from watched outputs."""

    edges: list[Edge]
    above: set[Node]
    """Nodes between the loss and the edges."""

    @contextmanager
    def signs(self, sign_N: Tensor) -> Iterator[None]:
        """Multiply the gradient on each edge by the sign of its row's sample."""
        with ExitStack() as stack:
            of_consumer: dict[Node, list[Edge]] = {}
            for edge in self.edges:
                if edge.consumer is not None:
                    of_consumer.setdefault(edge.consumer, []).append(edge)
            for consumer, edges in of_consumer.items():
                handle = consumer.register_hook(partial(_apply_signs, edges, sign_N))
                stack.callback(handle.remove)
            yield

    def root_gradients(
        self, gradients: Sequence[Tensor | None], sign_N: Tensor
    ) -> Sequence[Tensor | None]:
        """Return the gradients that `backward` starts from, with the signs of their samples."""
        signed = list(gradients)
        for edge in self.edges:
            gradient = gradients[edge.position] if edge.consumer is None else None
            if gradient is not None:
                signed[edge.position] = _signed(gradient, edge.layout, sign_N)
        return signed


def _apply_signs(
    edges: Sequence[Edge],
    sign_N: Tensor,
    inputs: Sequence[Tensor | None],
    _outputs: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    gradients = list(inputs)
    for edge in edges:
        gradient = gradients[edge.position]
        if gradient is not None:
            gradients[edge.position] = _signed(gradient, edge.layout, sign_N)
    return tuple(gradients)


def _signed(gradient: Tensor, layout: AxisLayout, sign_N: Tensor) -> Tensor:
    rows = gradient.shape[layout.axis]
    sign_R = sign_N[layout.samples(rows, len(sign_N))].to(gradient)
    return gradient * on_axis(sign_R, layout.axis, gradient.dim())


def on_axis(values_R: Tensor, axis: int, ndim: int) -> Tensor:
    """Return values with R on an axis of `ndim`, to be broadcast."""
    return values_R.reshape([-1 if place == axis else 1 for place in range(ndim)])


def sign_patterns(size: int) -> list[Tensor]:
    """Return the signs of the samples in each pass, (N,): none changed, then one bit after another.

    Examples
    --------
    >>> sign_patterns(3)
    [tensor([1, 1, 1]), tensor([-1,  1, -1]), tensor([ 1, -1, -1])]
    """
    codes = torch.arange(1, size + 1)
    bits = (1 - 2 * (codes >> bit & 1) for bit in range(size.bit_length()))
    return [torch.ones_like(codes), *bits]


def weight_pattern(size: int) -> Tensor:
    """Return the weights of the samples in the last pass, (N,): 2 for every other one.

    What scales the gradients of all samples by their norm, as hooks do, keeps it when signs change.
    """
    return 1 + torch.arange(1, size + 1) % 2


class Signs:
    """The owners of the rows of one output gradient, found from pass to pass.

    Parameters
    ----------
    shape
        Of the output.
    free
        Number of leading axes that may have samples; the axes after them are one row's features.
    """

    def __init__(self, shape: Sequence[int], free: int) -> None:
        self.shape, self.free = tuple(shape), free
        self._base: Tensor | None = None
        self._code: Tensor | None = None
        self._mixed: Tensor | None = None
        self._scale: Tensor | float = 0.0

    def see(self, gradient: Tensor | None, number: int) -> None:
        """Take the gradient of pass `number`; None is zero."""
        if gradient is None:
            if self._base is not None:
                self._compare(torch.zeros_like(self._base), number)
            return
        values = self._projected(gradient.detach())
        if number:
            self._compare(values, number)
        else:
            self._base = values
            self._code = torch.zeros(values.shape[:-1], dtype=torch.int64, device=values.device)
            self._mixed = torch.zeros_like(self._code, dtype=torch.bool)
            exact = gradient.device.type == "cpu" or torch.are_deterministic_algorithms_enabled()
            if not exact:
                eps = torch.finfo(gradient.dtype).eps
                self._scale = TOLERANCE * eps * values.abs().amax(-1, keepdim=True)

    def _projected(self, gradient: Tensor) -> Tensor:
        """Return each row's two random projections, (..., 2), or its one entry (..., 1).

        They stand for the row: two rows that differ have others, and a negated row negated ones.
        """
        values = gradient.to_dense() if gradient.layout != torch.strided else gradient
        values = values.reshape(self.shape)
        if values.is_complex():
            values = torch.view_as_real(values).flatten(-2)
        # So that no entry is lost in the sum.
        dtype = values.dtype if values.device.type == "mps" else torch.float64
        if self.free == values.dim():
            return values.to(dtype).unsqueeze(-1)
        rows = values.flatten(self.free).flatten(0, -2) if self.free else values.flatten()[None]
        features = rows.shape[-1]
        generator = torch.Generator().manual_seed(features)
        directions = torch.randn(features, 2, generator=generator, dtype=torch.float64)
        directions = directions.to(values.device, dtype)
        few = max(1, BLOCK // max(1, features))
        parts = [part.to(dtype) @ directions for part in rows.split(few)]
        return torch.cat(parts).unflatten(0, self.shape[: self.free]) if self.free else parts[0][0]

    def weigh(self, gradient: Tensor | None) -> None:
        """Take the gradient of the pass with other weights: rows of other samples have to stay."""
        if self._base is None or self._code is None or self._mixed is None:
            return
        stays = self._code % 2 == 0
        values = 0 * self._base if gradient is None else self._projected(gradient.detach())
        same = ((values - self._base).abs() <= self._scale).all(-1)
        self._mixed |= stays & ~same & self._base.isfinite().all(-1)

    def _compare(self, values: Tensor, number: int) -> None:
        if self._base is None:  # zero in the first pass, and not now: parts that cancelled
            self._base = torch.zeros_like(values)
            self._code = torch.zeros(values.shape[:-1], dtype=torch.int64, device=values.device)
            self._mixed = torch.zeros_like(self._code, dtype=torch.bool)
        assert self._code is not None
        assert self._mixed is not None
        same = ((values - self._base).abs() <= self._scale).all(-1)
        opposite = ((values + self._base).abs() <= self._scale).all(-1)
        self._code |= (opposite & ~same).long() << (number - 1)
        self._mixed |= ~(same | opposite)

    def owners(self, size: int) -> Tensor:
        """Return the sample of each row, of the shape of the free axes, or what else it is."""
        if self._base is None:
            return torch.full(self.shape[: self.free], NO_GRADIENT)
        assert self._code is not None
        assert self._mixed is not None
        owners = self._code - 1
        owners[self._code == 0] = OUTSIDE_CUT
        owners[self._mixed | (self._code > size)] = SEVERAL_SAMPLES
        owners[(self._base == 0).all(-1) & ~self._mixed] = NO_GRADIENT
        owners[~self._base.isfinite().all(-1)] = NOT_FINITE
        return owners.cpu()


def layouts_of(owners: Tensor, axes: Sequence[int], size: int) -> Iterator[AxisLayout]:
    """Yield the layouts that agree with the owners of rows, the simplest first.

    Parameters
    ----------
    owners
        Of the shape of the free axes; no longer SEVERAL_SAMPLES, OUTSIDE_CUT or NOT_FINITE.
    axes
        The free axes, the one on which samples are expected first.
    size
        Number of samples, N.
    """
    by_axis = {axis: along(owners, axis) for axis in axes}
    for kind in ("plain", "outer", "inner"):
        for axis, owner_R in by_axis.items():
            layout = AxisLayout(axis, kind)
            is_joined = kind != "plain" and owner_R is not None and len(owner_R) > size
            if owner_R is None or not (kind == "plain" or is_joined):
                continue
            if not layout.fits(owners.shape, size):
                continue
            expected = layout.samples(len(owner_R), size)
            if bool(((owner_R == expected) | (owner_R == NO_GRADIENT)).all()):
                yield layout
    for axis, owner_R in by_axis.items():
        if owner_R is not None:
            yield AxisLayout(axis, "listed", owner_R.clamp_min(0))


def joined_rows(
    layout: AxisLayout, rows: int, size: int, order: Tensor | None, device: torch.device
) -> Tensor | None:
    """Return the rows of each sample, (N, T) on a device; None where row n is that of sample n.

    Parameters
    ----------
    layout
        Of the axis.
    rows, size
        Numbers of rows, R, and of samples, N.
    order
        Sample of each row of the loss, where that is not the batch's order.
    """
    if layout.owners is None and order is None:  # made on the device: nothing waits for a copy
        if rows == size:
            return None
        index = torch.arange(rows, device=device)
        return index.view(size, -1) if layout.kind == "outer" else index.view(-1, size).t()
    samples = layout.samples(rows, size)
    samples = samples if order is None else order[samples]
    return rows_of_samples(samples, size).to(device)


def rows_of_samples(samples_R: Tensor, size: int) -> Tensor:
    """Return the rows of each sample, (N, T), padded by -1.

    Examples
    --------
    >>> rows_of_samples(torch.tensor([1, 0, 1]), 2)
    tensor([[ 1, -1],
            [ 0,  2]])
    """
    counts = samples_R.bincount(minlength=size)
    rows = samples_R.argsort(stable=True)
    places = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[samples_R[rows]]
    padded = torch.full((size, int(counts.max())), -1)
    padded[samples_R[rows], places] = rows
    return padded


def along(owners: Tensor, axis: int) -> Tensor | None:
    """Return the owner of each row of an axis, (R,); None if a row has several."""
    rows = owners.movedim(axis, 0).flatten(1) if owners.dim() > 1 else owners.unsqueeze(1)
    if not rows.numel():
        return torch.full((len(rows),), NO_GRADIENT)
    most = rows.amax(1)
    same = (rows == most.unsqueeze(1)) | (rows == NO_GRADIENT)
    return most if bool(same.all()) else None


def couples(
    cut: Cut, roots: Sequence[Tensor], gradients: Sequence[Tensor | None], size: int
) -> bool | None:
    """Return whether what is above a cut couples samples; None if it has no second derivative.

    For each bit of i + 1, the second derivative times a random direction on the samples that have
    it vanishes on the others, if the loss is a sum over samples: any two differ in some bit. What
    is piecewise linear (a hinge on differences of samples' scores, a median) has no second
    derivative that would show it.
    """
    # Of somebody's function, whose second derivative need not say what the first one is of.
    has_own = any(
        isinstance(node, torch.autograd.function.BackwardCFunction) and node.name() not in PASSING
        for node in cut.above
    )
    edges = list(dict.fromkeys((edge.node, edge.number, edge.layout) for edge in cut.edges))
    ends = [GradientEdge(node, number) for node, number, _ in edges]
    generator = torch.Generator().manual_seed(0)
    try:
        firsts = torch.autograd.grad(
            list(roots), ends, list(gradients), create_graph=True, allow_unused=True
        )
        known = [
            (first, layout)
            for first, (_, _, layout) in zip(firsts, edges, strict=True)
            if first is not None and first.requires_grad
        ]
        if not known:
            return None if has_own else False
        for sign_N in sign_patterns(size)[1:]:
            chosen_N = (1 - sign_N) / 2
            directions = [
                torch.randn(first.shape, generator=generator, dtype=_real(first)).to(first)
                * values_of_rows(chosen_N, layout, first)
                for first, layout in known
            ]
            seconds = torch.autograd.grad(
                [first for first, _ in known],
                ends,
                directions,
                retain_graph=True,
                allow_unused=True,
            )
            for second, (_, _, layout) in zip(seconds, edges, strict=True):
                if second is None:
                    continue
                others = second[
                    (values_of_rows(chosen_N, layout, second) == 0).expand(second.shape)
                ]
                if not bool(others.isfinite().all()):
                    return None
                if bool(others.any()):  # of a sum it is exactly zero: a product with zeros
                    return True
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return None
    return None if has_own else False


def _real(values: Tensor) -> torch.dtype:
    return torch.float64 if values.dtype in (torch.float64, torch.complex128) else torch.float32


def values_of_rows(values_N: Tensor, layout: AxisLayout, like: Tensor) -> Tensor:
    """Return each row's value, of its sample, to be broadcast to a tensor."""
    values_R = values_N[layout.samples(like.shape[layout.axis], len(values_N))]
    return on_axis(values_R, layout.axis, like.dim()).to(like)


@contextmanager
def side_effects_undone(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Restore buffers and random states that backward passes change, by checkpoints and hooks.

    Yields
    ------
    Callable
        Restores them between two passes.
    """
    buffers = [(buffer, buffer._version, buffer.clone()) for buffer in model.buffers()]
    state = torch.get_rng_state()
    on_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    cuda: Any = torch.cuda.get_rng_state_all() if on_cuda else []

    def restore() -> None:
        torch.set_rng_state(state)
        if on_cuda:
            torch.cuda.set_rng_state_all(cuda)
        for buffer, version, values in buffers:
            if buffer._version != version:
                # By .data, whose changes autograd does not count: it may have saved the buffer.
                buffer.data.copy_(values)

    try:
        yield restore
    finally:
        restore()


def sequence_owners(
    owners: Sequence[Tensor], count: int, packed: Tensor | None, batch_first: bool
) -> Tensor | None:
    """Return the owner of each sequence of a recurrent layer, (R,); None if one has several.

    Parameters
    ----------
    owners
        Of the rows of its outputs: the sequence of outputs, (T, R), (R, T) or packed, then states.
    count
        Number of sequences, R.
    packed
        The sequence of each row of the first output, where that is packed.
    batch_first
        Whether it is (R, T).
    """
    result = torch.full((count,), NO_GRADIENT)
    for number, output in enumerate(owners):
        if packed is not None and number == 0:
            most = torch.full((count,), NO_GRADIENT).scatter_reduce(0, packed, output, "amax")
            is_one = bool(((output == most[packed]) | (output == NO_GRADIENT)).all())
            found = most if is_one else None
        else:
            found = along(output, 0 if output.dim() == 1 or (batch_first and not number) else 1)
        if found is None:
            return None
        if bool(((found != result) & (found != NO_GRADIENT) & (result != NO_GRADIENT)).any()):
            return None
        result = torch.maximum(result, found)
    return result
