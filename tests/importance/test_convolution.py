"""The three ways to compute the norm of a kernel's gradient, against autograd."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.nn import functional

from sampimp.importance import per_sample
from sampimp.importance.rules import convolution
from sampimp.importance.rules.batch import Batch
from sampimp.importance.rules.registry import RULES

WAYS = {
    "pixels": -math.inf,
    "gradient or patches": math.inf,
    "by count": convolution.ADDITION,
}
"""The value of `ADDITION` that forces each way."""


@st.composite
def geometries(draw):
    """Draw a convolution, images, a kernel and options."""
    torch.manual_seed(1)
    axes = draw(st.integers(1, 3))

    def per_axis(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(axes))

    groups = draw(st.integers(1, 2))
    inputs, outputs = (groups * draw(st.integers(1, 3)) for _ in range(2))
    count, kernel, stride = draw(st.integers(1, 3)), per_axis(1, 3), per_axis(1, 3)
    options = {"stride": stride, "dilation": per_axis(1, 2), "groups": groups}
    transposed = draw(st.booleans())
    if transposed:
        options["padding"] = per_axis(0, 2)
        options["output_padding"] = tuple(draw(st.integers(0, size - 1)) for size in stride)
        shape = inputs, outputs // groups, *kernel
    else:
        same = stride == (1,) * axes and draw(st.booleans())
        options["padding"] = "same" if same else per_axis(0, 3)
        shape = outputs, inputs // groups, *kernel
    name = f"conv{'_transpose' if transposed else ''}{axes}d"
    images, weight = torch.randn(count, inputs, *per_axis(1, 6)), torch.randn(shape)
    return getattr(functional, name), images.double(), weight.double(), options


def factor_and_gradients(geometry):
    """Return the factor of a kernel, and the gradients of single samples by autograd."""
    function, images, weight, options = geometry
    try:
        output = function(images, weight, None, **options)
    except RuntimeError:  # the kernel is larger than the image
        assume(False)
    delta = torch.randn_like(output)
    weight.requires_grad_()
    expected = torch.stack(
        [
            torch.autograd.grad(
                (function(image[None], weight, None, **options) * delta_1).sum(), weight
            )[0]
            for image, delta_1 in zip(images, delta, strict=True)
        ]
    )
    batch = Batch(len(images), 0, lambda _: True)
    rule = RULES[function].factors(batch, delta, images, weight.detach(), None, **options)
    return next(iter(rule))[1], expected


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("way", WAYS)
@given(geometry=geometries())
def test_each_way_gives_the_norm_of_autograd(way, geometry):
    factor, expected = factor_and_gradients(geometry)
    torch.testing.assert_close(factor.gradient(slice(None)), expected, rtol=1e-9, atol=1e-9)
    order = torch.arange(len(expected)).flip(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "ADDITION", WAYS[way])
        squares = expected.flatten(1).square().sum(1)
        torch.testing.assert_close(factor.square(), squares, rtol=1e-9, atol=1e-9)
        reversed_squares = factor.joined(order[:, None]).square()
        torch.testing.assert_close(reversed_squares, squares[order], rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@given(geometry=geometries(), count=st.integers(1, 5), size=st.sampled_from([1, 2**18]))
def test_inner_products_are_those_of_the_gradients(geometry, count, size):
    """By a convolution and from the gradients, for one sample at a time and for all at once."""
    factor, gradients = factor_and_gradients(geometry)
    directions = torch.randn(count, *gradients.shape[1:]).double()
    flat = directions.flatten(1), gradients.flatten(1)
    bound = 1e-12 * torch.einsum("kp,np->kn", *(part.abs() for part in flat))
    order = torch.arange(len(gradients)).flip(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(per_sample, "CHUNK_ON_CPU", size)
        for forms in (True, False):
            patch.setattr(convolution, "forms_gradients", lambda *_, forms=forms: forms)
            difference = factor.inner(directions) - torch.einsum("kp,np->kn", *flat)
            assert (difference.abs() <= bound).all()
            reordered = factor.joined(order[:, None]).inner(directions)
            torch.testing.assert_close(reordered, factor.inner(directions)[:, order])
            empty = factor.joined(torch.zeros(0, 1, dtype=torch.long))
            assert empty.inner(directions).shape == (count, 0)


def test_the_cheapest_way_is_taken(monkeypatch):
    """For 3 x 3 on 4 x 4 and many channels, pixels are cheapest; with a stride of 8, patches.

    4 x 4, 8 channels:     16^2 (8 + 8 + 12 * 9) = 31,744; patches 16^2 (8 + 72) = 20,480;
                           gradient 16 * 8 * 72 = 9,216
    the same, 64 channels: 60,416 by pixels, 163,840 by patches, 589,824 the gradient
    32 x 32, step 8:       1,024^2 * 64 pixels, 16^2 (64 + 576) = 163,840 by patches
    """
    taken = []
    monkeypatch.setattr(
        convolution.Convolution,
        "_square_by_pixels",
        lambda self: taken.append(self) or torch.zeros(len(self.left)),
    )
    for channels, size, stride, by_pixels in (
        (8, 4, 1, False),
        (64, 4, 1, True),
        (64, 32, 8, False),
    ):
        images, weight = torch.rand(1, channels, size, size), torch.rand(channels, channels, 3, 3)
        delta = functional.conv2d(images, weight, None, stride, 1)
        rule = RULES[functional.conv2d].factors(
            Batch(1, 0, lambda _: True), delta, images, weight, None, stride, 1
        )
        next(iter(rule))[1].square()
        assert bool(taken) == by_pixels
        taken.clear()
