"""Every form of per-sample gradients against the gradients themselves."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sampimp.importance import gradients, parameter_step, per_sample
from sampimp.importance.gradients import (
    EmbeddingRows,
    Explicit,
    Outer,
    Product,
    Total,
    total,
)
from sampimp.importance.parameter_step import DerivativeRule, ParameterStep, Workspace
from sampimp.importance.update import Diagonal

SIZE = st.integers(1, 5)


class NotedRule(DerivativeRule):
    def after(self, step):
        return step.noted


def diagonal(values):
    """Return a `Diagonal` with these values of D."""
    step = ParameterStep(values, Workspace())
    step.noted = values
    return Diagonal(NotedRule(), step)


@st.composite
def outers(draw, samples=None, groups=None, outputs=None, inputs=None):
    n, t, g, o, i = samples or draw(SIZE), *(draw(SIZE) for _ in range(4))
    g, o, i = groups or g, outputs or o, inputs or i
    torch.manual_seed(draw(st.integers(0, 99)))
    left, right = torch.randn(n, t, g, o).double(), torch.randn(n, t, g, i).double()
    want = torch.einsum("ntgo,ntgi->ngoi", left, right).reshape(n, g * o, i)
    return Outer(left, right, (g * o, i)), want


@st.composite
def products(draw, samples=None, outputs=None, inputs=None):
    n, o, i = samples or draw(SIZE), outputs or draw(SIZE), inputs or draw(SIZE)
    torch.manual_seed(draw(st.integers(0, 99)))
    left, right = torch.randn(n, o).double(), torch.randn(n, i).double()
    return Product(Explicit(left), Explicit(right)), torch.einsum("no,ni->noi", left, right)


@st.composite
def tables(draw, samples=None, rows=None, entries=None):
    n, r, e, t = samples or draw(SIZE), rows or draw(SIZE), entries or draw(SIZE), draw(SIZE)
    torch.manual_seed(draw(st.integers(0, 99)))
    vectors, index = torch.randn(n, t, e).double(), torch.randint(0, r, (n, t))
    want = vectors.new_zeros(n, r, e)
    for sample, position in itertools.product(range(n), range(t)):
        want[sample, index[sample, position]] += vectors[sample, position]
    return EmbeddingRows(vectors, index, (r, e)), want


@st.composite
def uses(draw):
    """Draw a factor that is the sum of two or three of any forms."""
    n, o, i = draw(SIZE), draw(SIZE), draw(SIZE)
    kinds = [
        outers(samples=n, groups=1, outputs=o, inputs=i),
        tables(samples=n, rows=o, entries=i),
        outers(samples=n, groups=1, outputs=o, inputs=i).map(
            lambda case: (Explicit(case[1]), case[1])
        ),
    ]
    parts = draw(st.lists(st.one_of(kinds), min_size=1, max_size=3))
    return total([part for part, _ in parts], n, torch.empty(o, i)), sum(want for _, want in parts)


@settings(max_examples=60)
@given(
    st.one_of(outers(), products(), tables(), uses()), st.sampled_from([1, 5, 2**18]), st.booleans()
)
def test_every_form_equals_the_gradients(case, block, whole):
    factor, want = case
    values = torch.randn(want.shape[1:], dtype=want.dtype)
    derivative = diagonal(values)
    torch.testing.assert_close(factor.gradient(slice(None)), want)
    torch.testing.assert_close(factor.gradient(slice(1, 3)), want[1:3])
    order = torch.arange(len(want)).flip(0)
    torch.testing.assert_close(factor.joined(order[:, None]).gradient(slice(None)), want[order])
    pairs = torch.stack([order, torch.arange(len(want)).where(order > 0, -1)], 1)
    joined = want[order] + want * (order > 0).reshape(-1, *[1] * (want.dim() - 1))
    torch.testing.assert_close(factor.joined(pairs).gradient(slice(None)), joined)
    torch.testing.assert_close(factor.square(), want.square().sum((1, 2)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parameter_step, "BLOCK_ON_CPU", block)
        if whole:
            torch.testing.assert_close(derivative.square(), values.square())
        got = factor.weighted(derivative)
    torch.testing.assert_close(got, (values * want).square().sum((1, 2)))


def inner_products(directions, want):
    """Return the inner products of directions (K, P...) with gradients (N, P...)."""
    return torch.einsum("kp,np->kn", directions.flatten(1), want.flatten(1))


def assert_inner(factor, want, directions):
    """Compare with the gradients' inner products, relative to the sum of the terms' magnitudes."""
    got, magnitude = factor.inner(directions), inner_products(directions.abs(), want.abs())
    assert got.shape == (len(directions), len(want))
    assert ((got - inner_products(directions, want)).abs() <= 1e-12 * magnitude).all()


@settings(max_examples=100)
@given(st.one_of(outers(), products(), tables(), uses()), st.integers(1, 9))
def test_inner_products_are_those_of_the_gradients(case, count):
    factor, want = case
    directions = torch.randn(count, *want.shape[1:], dtype=want.dtype)
    assert_inner(factor, want, directions)
    empty = factor.joined(torch.zeros(0, 1, dtype=torch.long))
    assert_inner(empty, want[:0], directions)
    assert_inner(factor.joined(torch.zeros(2, 2, dtype=torch.long)), 2 * want[[0, 0]], directions)


@pytest.mark.parametrize("outputs", [3, 5])
@pytest.mark.parametrize(
    ("count", "positions", "has_gradients"), [(1, 90, False), (3, 30, True), (9, 3, False)]
)
def test_inner_products_with_and_without_gradients(
    count, positions, has_gradients, outputs, monkeypatch
):
    """The smaller of the sides is multiplied; gradients are formed for many directions.

    3 directions, 30 positions: 90 > 60 + 16; 9 and 3: 27 < 6 + 40
    """
    torch.manual_seed(1)
    left = torch.randn(7, positions, 2, outputs).double()
    right = torch.randn(7, positions, 2, 4).double()
    want = torch.einsum("ntgo,ntgi->ngoi", left, right).reshape(7, 2 * outputs, 4)
    monkeypatch.setattr(per_sample, "CHUNK_ON_CPU", 3 * want[0].numel())
    formed = []
    gradient = Outer.gradient
    monkeypatch.setattr(
        Outer, "gradient", lambda self, part: formed.append(g := gradient(self, part)) or g
    )
    directions = torch.randn(count, 2 * outputs, 4).double()
    assert_inner(Outer(left, right, (2 * outputs, 4)), want, directions)
    assert [len(chunk) for chunk in formed] == ([3, 3, 1] if has_gradients else [])


def test_uses_of_one_form_are_merged_into_it():
    outer = Outer(torch.ones(2, 1, 1, 4), torch.ones(2, 1, 1, 5), (4, 5))
    product = Product(Explicit(torch.ones(2, 4)), Explicit(torch.ones(2, 5)))
    table = EmbeddingRows(torch.ones(2, 1, 5), torch.zeros(2, 1, dtype=torch.long), (4, 5))
    assert total([outer], 2, torch.empty(4, 5)) is outer
    assert isinstance(total([outer, product], 2, torch.empty(4, 5)), Outer)
    assert isinstance(total([table, table], 2, torch.empty(4, 5)), EmbeddingRows)
    mixed = total([outer, table], 2, torch.empty(4, 5))
    assert isinstance(mixed, Total)
    assert mixed.square().tolist() == pytest.approx(
        [5 * 4 + 15 * 1] * 2
    )  # the entries of row 0 are 2, those of three rows 1


@pytest.mark.parametrize(
    ("positions", "outputs", "inputs"), [(2, 6, 7), (3, 6, 7), (20, 6, 7), (130, 300, 280)]
)
def test_the_gram_matrices_and_the_gradients_agree(positions, outputs, inputs, monkeypatch):
    """Gram matrices where T (O + I) < O I, for 130 positions in three parts; gradients for 20."""
    torch.manual_seed(1)
    left = torch.randn(4, positions, 2, outputs).double()
    right = torch.randn(4, positions, 2, inputs).double()
    outer = Outer(left, right, (2 * outputs, inputs))
    torch.testing.assert_close(
        outer.square(), gradients.in_chunks(outer, 4, left, per_sample.square_sum)
    )
    if positions != 20:
        monkeypatch.setattr(gradients, "in_chunks", None)
        outer.square()


def test_gradients_are_formed_for_a_few_samples_at_a_time(monkeypatch):
    torch.manual_seed(1)
    outer = Outer(torch.randn(5, 9, 1, 3), torch.randn(5, 9, 1, 4), (3, 4))
    want = outer.weighted(diagonal(torch.ones(3, 4)))
    held = []
    monkeypatch.setattr(per_sample, "CHUNK_ON_CPU", 2 * math.prod(outer.shape))
    gradient = Outer.gradient
    monkeypatch.setattr(
        Outer, "gradient", lambda self, part: held.append(g := gradient(self, part)) or g
    )
    torch.testing.assert_close(outer.weighted(diagonal(torch.ones(3, 4))), want)
    assert [len(chunk) for chunk in held] == [2, 2, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_squares_of_half_precision_are_computed_in_float32(dtype):
    left, right = (torch.full((2, 3, 1, 4), 2**-10, dtype=dtype) for _ in range(2))
    outer = Outer(left, right, (4, 4))
    product = Product(Explicit(left[:, 0, 0]), Explicit(right[:, 0, 0]))
    explicit = Explicit(torch.full((2, 3), 2**9, dtype=dtype))
    rows = EmbeddingRows(left[:, :, 0], torch.zeros(2, 3, dtype=torch.long), (5, 4))
    unit = diagonal(torch.ones(4, 4, dtype=dtype))
    assert (
        outer.square().tolist() == [16 * (3 * 2**-20) ** 2] * 2
    )  # smallest positive float16: 2^-24
    assert outer.weighted(unit).tolist() == [16 * (3 * 2**-20) ** 2] * 2
    assert product.square().tolist() == pytest.approx([16 * 2**-40] * 2)
    assert product.weighted(unit).tolist() == [16 * 2**-40] * 2
    assert explicit.square().tolist() == pytest.approx([3 * 2**18] * 2)  # largest: 2^16
    assert explicit.weighted(diagonal(torch.ones(3, dtype=dtype))).tolist() == [3 * 2**18] * 2
    assert rows.square().tolist() == pytest.approx([4 * (3 * 2**-10) ** 2] * 2)
    directions = torch.full((1, 4, 4), 2**-5, dtype=dtype)
    assert outer.inner(directions).tolist() == [[16 * 3 * 2**-25] * 2]
    assert product.inner(directions).tolist() == [[16 * 2**-25] * 2]
    assert rows.inner(directions).tolist() == [[4 * 3 * 2**-15] * 2]
    # 2^18 is out of the range of float16
    assert explicit.inner(torch.full((1, 3), 2**9, dtype=dtype)).tolist() == [[3 * 2**18] * 2]


def test_a_parameter_without_axes_is_one_number():
    scalar = Explicit(torch.tensor([3.0, -2.0]))
    assert scalar.square().tolist() == [9, 4]
    assert scalar.weighted(diagonal(torch.tensor(0.5))).tolist() == [2.25, 1]
    assert scalar.inner(torch.tensor([0.5, 2.0])).tolist() == [[1.5, -1], [6, -4]]
