"""Integer convolutions against exact arithmetic: float64 holds every sum of code products."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tensors import randn
from torch.nn import functional as F

from lightning_qat.ops.affine import quantize_affine
from lightning_qat.ops.integer_conv import ConvGeometry, conv_is_exact, integer_conv, pack_conv
from lightning_qat.ops.integer_linear import code_range

pytestmark = pytest.mark.skipif(not conv_is_exact(), reason="this CPU has no exact integer kernel")
TWO_ULPS = 2 * 2.0**-23


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_convolution_is_exact(data):
    def draw(low, high):
        return data.draw(st.integers(low, high))

    dims, groups, in_per_group, out_per_group = draw(1, 2), 1, draw(1, 70), draw(1, 70)
    if data.draw(st.booleans()):  # depthwise
        groups, in_per_group, out_per_group = draw(1, 70), 1, 1
    kernel, stride, padding, dilation = ([draw(*r) for _ in range(dims)] for r in ((1, 4), (1, 3), (0, 3), (1, 2)))
    size = [max(1, (k - 1) * d + 1 - 2 * p) + draw(0, 7) for k, d, p in zip(kernel, dilation, padding, strict=True)]
    seed, symmetric = draw(0, 2**16), data.draw(st.booleans())
    zero_point = data.draw(st.sampled_from((0, 1, 128, 201, 255)))
    out = groups * out_per_group

    x = randn(draw(1, 3), groups * in_per_group, *size, seed=seed) * 3.0
    if dims == 2 and data.draw(st.booleans()):
        x = x.to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(seed)
    w = torch.randint(-128, 128, (out, in_per_group, *kernel), generator=generator).to(torch.int8)
    w_scale = randn(out if data.draw(st.booleans()) else 1, seed=seed + 1) * 0.01
    bias = randn(out, seed=seed + 2) if data.draw(st.booleans()) else None
    scale, codes = torch.tensor(0.031), code_range(8, symmetric, 0 if symmetric else zero_point)
    geometry = ConvGeometry(tuple(kernel), tuple(stride), tuple(padding), tuple(dilation), groups)

    assume(geometry.is_exact_for([n + 2 * p for n, p in zip(size, padding, strict=True)]))
    weight = pack_conv(w, w_scale, geometry, scale.item(), codes)
    result = integer_conv(x, scale, codes, weight, bias, scale.item(), geometry)

    zero = None if symmetric else torch.tensor(zero_point)
    x_codes = quantize_affine(x, scale, zero, bits=8, symmetric=symmetric).double() - (0 if symmetric else zero_point)
    convolve = F.conv1d if dims == 1 else F.conv2d
    acc = convolve(x_codes, w.double(), None, stride, padding, dilation, groups)
    by_channel = (-1, *[1] * dims)
    product = acc * (scale.double() * w_scale.double()).view(by_channel)
    offset = torch.zeros(()) if bias is None else bias.double().view(by_channel)
    assert ((result.double() - (product + offset)).abs() <= TWO_ULPS * (product.abs() + offset.abs())).all()


@pytest.mark.parametrize(
    ("channels", "geometry", "size"),
    [
        ((8, 1), ConvGeometry((1,), (3,), (2,), (2,), 1), (1,)),
        ((6, 6), ConvGeometry((1,), (3,), (2,), (2,), 6), (1,)),
        ((9, 6), ConvGeometry((3, 2), (3, 1), (3, 1), (1, 2), 1), (8, 1)),
    ],
)
def test_outputs_that_see_nothing_but_padding(channels, geometry, size):
    """On these oneDNN itself crashes or is wrong."""
    w = torch.randint(-128, 128, (channels[1], channels[0] // geometry.groups, *geometry.kernel)).to(torch.int8)
    x, one, codes = torch.randint(0, 256, (3, channels[0], *size)).float(), torch.tensor(1.0), code_range(8, False, 255)
    result = integer_conv(x - 255, one, codes, pack_conv(w, one, geometry, 1.0, codes), None, 1.0, geometry)
    convolve, g = F.conv1d if len(size) == 1 else F.conv2d, geometry
    wanted = convolve(x.double() - 255, w.double(), None, g.stride, g.padding, g.dilation, g.groups)
    assert torch.equal(result.double(), wanted)


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [1, 6])
def test_layout_follows_the_input(channels, layout, size):
    x = randn(2, channels, size, size).to(memory_format=layout)
    w, geometry = torch.ones(7, channels, 3, 3, dtype=torch.int8), ConvGeometry((3, 3), (1, 1), (2, 2), (1, 1), 1)
    scale, codes = torch.tensor(0.1), code_range(8, False, 9)
    weight = pack_conv(w, scale, geometry, 0.1, codes)
    result = integer_conv(x, scale, codes, weight, None, 0.1, geometry)
    if layout == torch.channels_last and size > 1:
        assert result.is_contiguous(memory_format=torch.channels_last)
    else:
        assert result.is_contiguous()
