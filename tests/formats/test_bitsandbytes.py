"""Exchange with bitsandbytes: its own state dicts are the witness, byte for byte, and its modules load ours.

What it dequantizes on a CPU is wrong for some shapes, so values are compared with ``code * absmax``.
"""

from __future__ import annotations

import json
from dataclasses import replace

import bitsandbytes as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import randn
from torch import Tensor, nn

import lightning_qat as lq
from lightning_qat import BitsAndBytesConfig
from lightning_qat.ops.codebook_tables import codebook


def linear4bit(weight: Tensor, kind: str, block: int, nested: bool) -> bnb.nn.Linear4bit:
    """Return a layer that bitsandbytes quantized on the CPU; its forward, which repacks, is never called."""
    layer = bnb.nn.Linear4bit(
        weight.shape[1], weight.shape[0], bias=False, quant_type=kind, compress_statistics=nested, device="meta"
    )
    parameter = bnb.nn.Params4bit(
        weight.clone(), requires_grad=False, quant_type=kind, blocksize=block, compress_statistics=nested
    )
    layer.weight = parameter.to("cpu")
    return layer


def theirs(weight: Tensor, kind: str, block: int, nested: bool) -> dict[str, Tensor]:
    packed, state = bnb.functional.quantize_4bit(weight, blocksize=block, compress_statistics=nested, quant_type=kind)
    return {"weight": packed, **{f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}}


def assert_same(ours: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert list(ours) == list(other)
    for name, value in ours.items():
        assert (value.dtype, value.shape) == (other[name].dtype, other[name].shape), name
        assert value.numpy().tobytes() == other[name].numpy().tobytes(), name


def test_the_witness_is_right() -> None:
    # Independent of both: the nearest of the sixteen values that the QLoRA paper lists, worked out in float64.
    x = randn(64, 64)
    state = theirs(x, "nf4", 64, False)
    nibbles = torch.stack((state["weight"].view(-1) >> 4, state["weight"].view(-1) & 15), 1).view(-1)
    absmax = x.view(-1, 64).abs().amax(1)
    assert torch.equal(state["weight.absmax"], absmax)
    table = state["weight.quant_map"].double()
    ratio = (x.double().view(-1, 64) / absmax.double()[:, None]).view(-1, 1)
    distance = (ratio - table).abs()
    chosen = distance.gather(1, nibbles.long()[:, None])[:, 0]
    assert (chosen <= distance.amin(1) + 1e-6).all()


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["nf4", "fp4"]),
    block=st.sampled_from([64, 128, 256, 512, 1024, 2048, 4096]),
    nested=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    shape=st.tuples(st.integers(1, 70), st.integers(1, 200)),
    seed=st.integers(0, 2**16),
    special=st.sampled_from(["plain", "zeros", "zero block", "constant", "tiny", "midpoints"]),
)
def test_four_bits_are_theirs(kind, block, nested, dtype, shape, seed, special) -> None:
    x = randn(*shape, seed=seed)
    if special == "zeros":
        x.zero_()
    if special == "zero block":
        x.view(-1)[:block] = 0
    if special == "constant":
        x.fill_(-0.7)
    if special == "tiny":
        x *= 1e-6
    if special == "midpoints":
        table = codebook(kind, "cpu").sort().values
        middles = (table[1:] + table[:-1]) / 2
        x = middles[torch.randint(len(middles), shape, generator=torch.Generator().manual_seed(seed))]
        x.view(-1)[0] = 1.0
    x = x.to(dtype)
    config = BitsAndBytesConfig(bits=4, quant_type=kind, block_size=block, nested_quantization=nested)
    ours = lq.to_bitsandbytes_format(x, config)
    assert_same(ours, theirs(x, kind, block, nested))
    held = lq.from_bitsandbytes_format(ours, config)
    assert_same(lq.to_bitsandbytes_format(held), ours)
    assert held.dequantize().dtype == dtype
    assert torch.equal(held.dequantize(), lq.quantize_4bit(x, config).dequantize())


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_modules_exchange_state_dicts_strictly(kind: str, nested: bool) -> None:
    x = randn(96, 128).to(torch.float16)
    layer = linear4bit(x, kind, 64, nested)
    state = layer.state_dict()
    config = BitsAndBytesConfig(bits=4, quant_type=kind, block_size=64, nested_quantization=nested)
    ours = lq.to_bitsandbytes_format(x, config)
    assert set(ours) == set(state)
    for name, value in state.items():
        assert torch.equal(ours[name], value), name
    table, held = codebook(kind, "cpu"), lq.from_bitsandbytes_format(state)
    scale = held.scale.repeat_interleave(64).view(x.shape)
    assert torch.equal(held.dequantize(), (table[held.codes.long()] * scale).half())
    fresh = bnb.nn.Linear4bit(128, 96, bias=False, quant_type=kind, compress_statistics=nested)
    fresh.weight = bnb.nn.Params4bit.from_prequantized(
        ours["weight"], {k.removeprefix("weight."): v for k, v in ours.items() if k != "weight"}, device="cpu"
    )
    again = fresh.state_dict()
    assert set(again) == set(ours)
    for name, value in again.items():
        assert torch.equal(ours[name], value), name
    blank = bnb.nn.Linear4bit(128, 96, bias=False, quant_type=kind, compress_statistics=nested)
    blank.weight = bnb.nn.Params4bit(torch.zeros(96, 128).half(), quant_type=kind, compress_statistics=nested).to("cpu")
    assert not blank.load_state_dict({k: v for k, v in ours.items() if k == "weight"}, strict=True).missing_keys


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16, torch.float32, torch.int8])
@pytest.mark.parametrize("nested", [False, True])
def test_bytes_stored_as_other_numbers_are_read(storage: torch.dtype, nested: bool) -> None:
    x = randn(32, 64)
    layer = bnb.nn.Linear4bit(64, 32, quant_type="nf4", compress_statistics=nested, quant_storage=storage)
    layer.load_state_dict({"weight": x, "bias": torch.zeros(32)})
    state = layer.to("cpu").state_dict()
    assert state["weight"].dtype == storage
    before = {name: value.clone() for name, value in state.items()}
    config = BitsAndBytesConfig(bits=4, block_size=64, nested_quantization=nested)
    held = lq.from_bitsandbytes_format(state, config)
    assert_same(lq.to_bitsandbytes_format(held), lq.to_bitsandbytes_format(x, config))
    assert all(value.equal(before[name]) for name, value in state.items() if name != "weight")
    assert state["weight"].view(torch.uint8).equal(before["weight"].view(torch.uint8))
    with pytest.raises(ValueError, match=f"weight is {storage} with 3 elements"):
        lq.from_bitsandbytes_format({**state, "weight": state["weight"][:3]})


@settings(max_examples=60, deadline=None)
@given(
    block=st.sampled_from([64, 128, 256, 1024, 4096]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    shape=st.tuples(st.integers(1, 70), st.integers(1, 200)),
    seed=st.integers(0, 2**16),
)
def test_the_dynamic_map_is_theirs(block, dtype, shape, seed) -> None:
    x = randn(*shape, seed=seed).to(dtype)
    held = lq.quantize_dynamic_tree(x, BitsAndBytesConfig(dynamic_tree=True, block_size=block))
    codes, state = bnb.functional.quantize_blockwise(x, blocksize=block)
    assert torch.equal(held.codes, codes)
    assert torch.equal(held.scale, state.absmax)
    ours = lq.to_bitsandbytes_format(held)
    assert torch.equal(ours["weight.quant_map"], state.code)
    assert torch.equal(lq.from_bitsandbytes_format(ours).dequantize(), held.dequantize())


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    shape=st.tuples(st.integers(1, 50), st.integers(1, 100)),
    threshold=st.sampled_from([0.0, 2.0, 6.0]),
    seed=st.integers(0, 2**16),
)
def test_int8_is_theirs(dtype, shape, threshold, seed) -> None:
    x = (randn(*shape, seed=seed) * 2).to(dtype)
    held = lq.quantize_int8(x, BitsAndBytesConfig(outlier_threshold=threshold))
    codes, scale, columns = bnb.functional.int8_vectorwise_quant(x.half().clone(), threshold)
    assert torch.equal(held.codes, codes)
    assert torch.equal(held.scale, scale)
    found = torch.empty(0, dtype=torch.int64) if held.outliers is None else held.outliers.columns
    assert torch.equal(found, torch.empty(0, dtype=torch.int64) if columns is None else columns)


def test_int8_modules_exchange_state_dicts_strictly() -> None:
    x, bias = randn(24, 40), randn(24)
    layer = bnb.nn.Linear8bitLt(40, 24, has_fp16_weights=False, threshold=6.0)
    layer.load_state_dict({"weight": x, "bias": bias})
    layer = layer.to("cpu")
    if layer.weight.dtype != torch.int8:  # quantized on the first move to an accelerator only
        layer.weight.data = x.half()
        layer.weight = bnb.nn.Int8Params(x.half(), requires_grad=False, has_fp16_weights=False)
        layer.weight = layer.weight._quantize("cpu") if hasattr(layer.weight, "_quantize") else layer.weight
        layer.init_8bit_state()
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    ours = lq.to_bitsandbytes_format(x, BitsAndBytesConfig(outlier_threshold=0.0))
    assert set(ours) == set(state) - {"bias"}
    for name, value in ours.items():
        assert torch.equal(value, state[name]), name
    held = lq.from_bitsandbytes_format(state)
    assert torch.equal(held.codes, state["weight"])
    assert torch.equal(held.scale, state["SCB"])
    result = layer.load_state_dict({**ours, "bias": bias}, strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys


def test_quant_state_text() -> None:
    config = BitsAndBytesConfig(bits=4, block_size=64, nested_quantization=True)
    ours = lq.to_bitsandbytes_format(randn(8, 64), config)
    facts = json.loads(bytes(ours["weight.quant_state.bitsandbytes__nf4"].tolist()))
    assert list(facts) == [
        "quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset",
    ]  # fmt: skip


def test_what_does_not_fit_is_refused() -> None:
    x = randn(8, 64)
    good = lq.to_bitsandbytes_format(x, BitsAndBytesConfig(bits=4, block_size=64))
    with pytest.raises(ValueError, match="has no 'weight'"):
        lq.from_bitsandbytes_format({"layer.weight": x})
    with pytest.raises(ValueError, match="neither 'SCB' nor"):
        lq.from_bitsandbytes_format({"weight": good["weight"]})
    with pytest.raises(ValueError, match="takes uint8 with 256"):
        lq.from_bitsandbytes_format({**good, "weight": good["weight"][:5]})
    with pytest.raises(ValueError, match="damaged or incomplete"):
        lq.from_bitsandbytes_format({k: v for k, v in good.items() if k != "weight.absmax"})
    with pytest.raises(ValueError, match="not bitsandbytes' own table"):
        lq.from_bitsandbytes_format({**good, "weight.quant_map": good["weight.quant_map"] * 2})
    with pytest.raises(ValueError, match="is not how the tensor is quantized"):
        lq.from_bitsandbytes_format(good, BitsAndBytesConfig(bits=4, block_size=128))
    with pytest.raises(ValueError, match="no format of bitsandbytes"):
        lq.to_bitsandbytes_format(lq.quantize(x, "int8"))
    with pytest.raises(ValueError, match="use quantize_4bit"):
        lq.quantize_int8(x, BitsAndBytesConfig(bits=4))
    with pytest.raises(ValueError, match="use quantize_int8"):
        lq.quantize_4bit(x, BitsAndBytesConfig(bits=8))
    spread = x.clone()
    spread[0, 3] = 50
    with pytest.raises(ValueError, match="columns in 16 bit"):
        lq.to_bitsandbytes_format(lq.quantize_int8(spread, BitsAndBytesConfig(outlier_threshold=6.0)))


def test_columns_in_another_order_are_refused() -> None:
    held = lq.quantize(randn(8, 64), lq.QuantizationConfig("nf4", group_size=64))
    with pytest.raises(ValueError, match=r"the columns of the tensor lie in another order \(GPTQ\)"):
        lq.to_bitsandbytes_format(replace(held, order=torch.arange(64).flip(0)))


@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
def test_a_trained_layer_ships_as_theirs(scheme: str) -> None:
    torch.manual_seed(0)
    model = lq.prepare(nn.Sequential(nn.Linear(64, 32)), scheme)
    optimizer, x = torch.optim.SGD(model.parameters(), 0.1), randn(16, 64)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    weight = model[0].weight.detach().clone()
    layer = lq.convert(model)[0]
    other = theirs(weight, scheme, 64, False)
    assert torch.equal(layer.weight_packed.view(-1, 1), other["weight"])
    assert torch.equal(layer.scale, other["weight.absmax"])


def test_empty_tensors_and_blocks_that_are_not_theirs() -> None:
    empty = lq.to_bitsandbytes_format(lq.quantize_int8(torch.empty(0, 4), BitsAndBytesConfig(outlier_threshold=0.0)))
    assert empty["weight"].shape == (0, 4)
    with pytest.raises(ValueError, match="block_size=48 is not one of bitsandbytes"):
        lq.to_bitsandbytes_format(lq.quantize(randn(8, 64), lq.QuantizationConfig("nf4", group_size=48)))
