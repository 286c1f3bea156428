"""The README's table for those who come from bitsandbytes: every row is tried, both sides of it.

Bytes are compared with bytes. Its CPU dequantization is wrong for some shapes: values are compared where it is right.
"""

from __future__ import annotations

import copy
import importlib.util
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from linear_models import quantized
from tensors import randn
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_qat as lq
from lightning_qat import BitsAndBytesConfig, LayerRule, QuantizationConfig, QuantizationPlan

README = Path(__file__).parent.parent / "README.md"
NESTED = BitsAndBytesConfig(bits=4, block_size=64, nested_quantization=True)

#: What the first column of the table says, row by row, each with the test that tries it.
TRIED: dict[str, Callable[..., None]] = {}


def row(*calls: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def remember(test: Callable[..., None]) -> Callable[..., None]:
        TRIED.update(dict.fromkeys(calls, test))
        return test

    return remember


def columns(text: str) -> list[tuple[str, str]]:
    """Return the first two cells of each row of the table whose head is ``bitsandbytes``."""
    table = re.search(r"^\| `bitsandbytes` \|.*\n\|[-| :]+\n((?:\|.*\n?)+)", text, re.MULTILINE)
    lines = table.group(1).splitlines() if table else []
    return [(line.split("|")[1], line.split("|")[2]) for line in lines]


def calls(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


class Net(nn.Module):
    """A Linear, one called ``lm_head``, and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.body, self.lm_head = nn.Embedding(50, 64), nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, index: Tensor) -> Tensor:
        return self.lm_head(F.relu(self.body(self.tokens(index))))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def loaded(layer: nn.Module, like: nn.Module) -> nn.Module:
    """Return ``layer`` of bitsandbytes with the weights of ``like``, quantized as it does on a move to a device."""
    layer.load_state_dict(like.state_dict())
    return layer.to("cpu")


def converted(layer: nn.Module, plan: lq.QATConfig | QuantizationConfig | str) -> nn.Module:
    """Return what a layer becomes here."""
    model = lq.prepare(nn.Sequential(layer), plan)
    return lq.convert(model.eval())[0]


def stored(x: Tensor, kind: str, nested: bool) -> dict[str, Tensor]:
    """Return what bitsandbytes makes of ``x`` as it stores it."""
    packed, state = bnb.functional.quantize_4bit(x, blocksize=64, quant_type=kind, compress_statistics=nested)
    return {"weight": packed, **{f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}}


def assert_same_tensors(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        assert torch.equal(ours[name], value), name


def assert_same_bytes(layer: nn.Module, state: dict[str, Tensor], nested: bool) -> None:
    names = {"weight": layer.weight_packed, "weight.absmax": layer.weight_scale}
    if nested:
        names["weight.nested_absmax"] = layer.weight_scale_absmax
    assert ("weight.nested_absmax" in state) == nested
    for name, tensor in names.items():
        assert tensor.dtype == state[name].dtype, name
        assert torch.equal(tensor.flatten(), state[name].flatten()), name


@row('bnb.nn.Linear4bit(n, m, quant_type="nf4", compress_statistics=False)', "bnb.nn.LinearNF4(n, m)")
@row('bnb.nn.Linear4bit(n, m, quant_type="nf4")', "bnb.nn.LinearFP4(n, m)")
@pytest.mark.parametrize(
    ("make", "plan", "nested"),
    [
        (partial(bnb.nn.Linear4bit, quant_type="nf4", compress_statistics=False), "nf4", False),
        (partial(bnb.nn.Linear4bit, quant_type="fp4", compress_statistics=False), "fp4", False),
        (partial(bnb.nn.Linear4bit, quant_type="nf4"), QuantizationConfig("nf4", bnb=NESTED), True),
        (bnb.nn.LinearNF4, QuantizationConfig("nf4", bnb=NESTED), True),
        (bnb.nn.LinearFP4, QuantizationConfig("fp4", bnb=NESTED), True),
    ],
)
def test_linear_4bit(make: Callable[[int, int], nn.Module], plan: QuantizationConfig | str, nested: bool) -> None:
    layer = nn.Linear(256, 128)
    theirs = loaded(make(256, 128), layer)
    state = {name: value.clone() for name, value in theirs.state_dict().items()}
    ours = converted(layer, plan)
    assert_same_bytes(ours, state, nested)
    x = randn(8, 256)
    values = bnb.functional.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state)
    assert torch.equal(values, ours.weight)  # of this shape they are right
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs.train()(x), rtol=1e-4, atol=1e-4)


def test_the_weight_trains_before_which_theirs_cannot() -> None:
    layer = nn.Linear(128, 64)
    assert not loaded(bnb.nn.LinearNF4(128, 64), layer).weight.requires_grad
    model = lq.prepare(nn.Sequential(layer), "nf4")
    before = layer.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    model(randn(16, 128)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(layer.weight, before)
    packed, state = bnb.functional.quantize_4bit(layer.weight.detach(), blocksize=64, quant_type="nf4")
    shipped = lq.convert(model.eval())[0]
    assert torch.equal(shipped.weight_packed, packed.flatten())  # and it is quantized as theirs all the same
    assert torch.equal(shipped.weight_scale, state.absmax)


@row("bnb.nn.Linear8bitLt(n, m, has_fp16_weights=False, threshold=6.0)")
@pytest.mark.parametrize("threshold", [6.0, 2.5, 0.0])
def test_linear_8bit(threshold: float) -> None:
    layer, x = nn.Linear(256, 128), randn(16, 256)
    x[3, 17] = 40.0
    theirs = loaded(bnb.nn.Linear8bitLt(256, 128, has_fp16_weights=False, threshold=threshold), layer)
    state = {name: value.clone() for name, value in theirs.state_dict().items()}
    config = lq.QATConfig("llm_int8", bnb=BitsAndBytesConfig(outlier_threshold=threshold))
    assert (config == lq.PRESETS["llm_int8"]) == (threshold == 6.0)
    ours = converted(copy.deepcopy(layer), config)
    assert torch.equal(ours.codes, state["weight"])
    assert torch.equal(ours.scale, state["SCB"])
    with torch.no_grad():
        expected, result = theirs.eval()(x), ours(x)
        whole = converted(layer, lq.QATConfig("llm_int8", bnb=BitsAndBytesConfig(outlier_threshold=0.0)))(x)
    assert lq.sqnr(expected, result) > 80  # quantization itself costs 33 to 43 dB
    assert torch.equal(result, whole) == (threshold == 0.0)


@row("bnb.nn.Linear8bitLt(n, m, threshold=6.0)")
def test_linear_8bit_in_training() -> None:
    layer, x, wanted = nn.Linear(64, 32), randn(16, 64), randn(16, 32, seed=1)
    theirs = bnb.nn.Linear8bitLt(64, 32, threshold=6.0)
    theirs.load_state_dict(layer.state_dict())
    ours = lq.prepare(nn.Sequential(nn.Linear(64, 32)), "llm_int8")
    ours[0].load_state_dict(layer.state_dict(), strict=False)
    outputs = [model(x) for model in (theirs, ours)]
    for result in outputs:
        F.mse_loss(result, wanted).backward()
    gradients = [theirs.weight.grad, ours[0].weight.grad]
    weight_only = lq.convert(lq.prepare(nn.Sequential(layer), QuantizationConfig("llm_int8")).eval())(x)
    torch.testing.assert_close(outputs[0], weight_only, rtol=1e-3, atol=1e-3)  # its CPU quantizes no input in training
    assert 30 < lq.sqnr(outputs[0].detach(), outputs[1].detach()) < 60
    assert F.cosine_similarity(gradients[0].flatten(), gradients[1].flatten(), 0) > 0.999


@row('bnb.nn.Embedding4bit(n, m, quant_type="nf4")', "bnb.nn.Embedding8bit(n, m)")
@pytest.mark.parametrize("kind", ["nf4", "fp4", "llm_int8"])
def test_embeddings(kind: str, net: Net) -> None:
    index = torch.tensor([[1, 4, 1], [49, 0, 7]])
    make = bnb.nn.Embedding8bit if kind == "llm_int8" else partial(bnb.nn.Embedding4bit, quant_type=kind)
    theirs = loaded(make(50, 64), net.tokens)
    ours = lq.convert(lq.prepare(net, QuantizationPlan([LayerRule(nn.Embedding, kind)])))
    assert quantized(ours) == ["tokens"]
    assert ours.tokens.weight_packed.numpy().tobytes() == theirs.weight.data.numpy().tobytes()
    looked_up = ours.tokens(index)
    torch.testing.assert_close(looked_up, theirs(index), rtol=1e-6, atol=1e-7)
    assert torch.equal(looked_up, F.embedding(index, ours.tokens.weight))
    with pytest.raises(NotImplementedError, match="not implemented"):
        theirs.state_dict()
    assert "tokens.weight_packed" in ours.state_dict()


@row('bnb.utils.replace_linear(model, bnb.nn.LinearNF4, skip_modules=("lm_head",))')
def test_which_layers(net: Net) -> None:
    plan = QuantizationPlan([LayerRule("lm_head")], base=lq.QATConfig("nf4", activation_bits=None, bnb=NESTED))
    theirs = loaded(bnb.utils.replace_linear(Net(), bnb.nn.LinearNF4, skip_modules=("lm_head",)), net)
    ours = lq.convert(lq.prepare(net, plan))
    assert quantized(ours) == ["body"]
    assert [name for name, m in theirs.named_modules() if isinstance(m, bnb.nn.Linear4bit)] == ["body"]
    assert_same_bytes(ours.body, theirs.body.state_dict(), nested=True)


@row(
    'bnb.functional.quantize_4bit(x, blocksize=64, quant_type="nf4")',
    'bnb.functional.quantize_4bit(x, blocksize=64, quant_type="nf4", compress_statistics=True)',
    "bnb.functional.quantize_fp4(x, blocksize=64)",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_quantize_4bit(dtype: torch.dtype) -> None:
    x = randn(100, 130).to(dtype)
    fp4 = lq.quantize_4bit(x, BitsAndBytesConfig(bits=4, block_size=64, quant_type="fp4"))
    assert torch.equal(bnb.functional.quantize_fp4(x, blocksize=64)[0].flatten(), fp4.packed)
    assert_same_tensors(lq.to_bitsandbytes_format(fp4), stored(x, "fp4", False))
    assert_same_tensors(lq.to_bitsandbytes_format(lq.quantize_4bit(x)), stored(x, "nf4", False))
    assert_same_tensors(lq.to_bitsandbytes_format(lq.quantize_4bit(x, NESTED)), stored(x, "nf4", True))
    with pytest.raises(ValueError, match="nan at index"):
        lq.quantize_4bit(torch.where(x == x.max(), torch.nan, x))


@row("bnb.functional.dequantize_4bit(packed, state)")
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_dequantize_4bit(kind: str, nested: bool) -> None:
    x = randn(128, 256)
    config = BitsAndBytesConfig(bits=4, block_size=64, quant_type=kind, nested_quantization=nested)
    packed, state = bnb.functional.quantize_4bit(x, blocksize=64, quant_type=kind, compress_statistics=nested)
    ours = lq.quantize_4bit(x, config).dequantize()
    assert torch.equal(ours, bnb.functional.dequantize_4bit(packed, state))
    assert torch.equal(lq.dequantize_bitsandbytes(stored(x, kind, nested)), ours)


def test_where_their_dequantization_is_wrong_ours_is_the_table_times_the_scale() -> None:
    x, held = randn(128, 96), lq.quantize_4bit(randn(128, 96))
    packed, state = bnb.functional.quantize_4bit(x, blocksize=64, quant_type="nf4")
    nibbles = torch.stack((packed.flatten() >> 4, packed.flatten() & 15), 1).flatten().long()
    values = (state.code[nibbles].view(-1, 64) * state.absmax[:, None]).view(x.shape)
    assert torch.equal(held.packed, packed.flatten())
    assert torch.equal(held.dequantize(), values)
    theirs = bnb.functional.dequantize_4bit(packed, state)
    assert torch.equal(theirs, values) or (theirs - x).abs().max() > 1.1 * (values - x).abs().max()  # 0.50.2: wrong


@row("bnb.functional.quantize_blockwise(x, blocksize=256)", "bnb.functional.dequantize_blockwise(codes, state)")
@pytest.mark.parametrize("shape", [(64, 256), (33, 77)])
def test_blockwise_8bit(shape: tuple[int, int]) -> None:
    x = randn(*shape)
    codes, state = bnb.functional.quantize_blockwise(x, blocksize=256)
    ours = lq.quantize_dynamic_tree(x)
    assert torch.equal(ours.codes, codes)
    assert torch.equal(ours.scale, state.absmax)
    assert torch.equal(ours.dequantize(), bnb.functional.dequantize_blockwise(codes, state))
    large = BitsAndBytesConfig(dynamic_tree=True, block_size=4096)
    assert torch.equal(lq.quantize_dynamic_tree(x, large).codes, bnb.functional.quantize_blockwise(x)[0])


@row("bnb.functional.int8_vectorwise_quant(x, threshold=6.0)", "bnb.functional.int8_vectorwise_dequant(codes, scale)")
@pytest.mark.parametrize("outlier", [False, True])
def test_vectorwise_8bit(outlier: bool) -> None:
    x = randn(40, 96).half()
    if outlier:
        x[3, 5], x[7, 60] = 9.0, -6.0
    codes, scale, columns = bnb.functional.int8_vectorwise_quant(x.clone(), threshold=6.0)
    ours = lq.quantize_int8(x, BitsAndBytesConfig(outlier_threshold=6.0))
    assert torch.equal(ours.codes, codes)
    assert torch.equal(ours.scale, scale)
    values = bnb.functional.int8_vectorwise_dequant(codes, scale)
    if outlier:
        assert ours.outliers.columns.tolist() == columns.tolist() == [5, 60]
        values[:, columns] = x[:, columns].float()  # which theirs leaves to the caller
    torch.testing.assert_close(ours.dequantize(torch.float32), values, rtol=1e-6, atol=0)


@row("bnb.functional.create_dynamic_map()", 'bnb.functional.get_4bit_type("nf4")')
def test_tables() -> None:
    ours = lq.to_bitsandbytes_format(randn(2, 64), NESTED)
    assert torch.equal(ours["weight.quant_map"], bnb.functional.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(ours["weight.nested_quant_map"], bnb.functional.create_dynamic_map())


@row("layer.state_dict()", "bnb.nn.Params4bit.from_prequantized(data, stats)", "layer.load_state_dict(state)")
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_state_dicts_of_4bit_layers_both_ways(kind: str, nested: bool) -> None:
    layer = nn.Linear(128, 64)
    make = lambda: bnb.nn.Linear4bit(128, 64, quant_type=kind, compress_statistics=nested)  # noqa: E731
    theirs = loaded(make(), layer)
    state = theirs.state_dict()
    config = BitsAndBytesConfig(bits=4, block_size=64, quant_type=kind, nested_quantization=nested)
    assert_same_bytes(converted(layer, QuantizationConfig(kind, bnb=config)), state, nested)
    ours = lq.to_bitsandbytes_format(lq.from_bitsandbytes_format(state, config))
    fresh = make()
    stats = {name.removeprefix("weight."): value for name, value in ours.items() if name != "weight"}
    fresh.weight = bnb.nn.Params4bit.from_prequantized(ours["weight"], stats, device="cpu")
    fresh.bias = theirs.bias
    assert_same_tensors(fresh.state_dict(), state)


def test_state_dicts_of_8bit_layers_both_ways() -> None:
    layer, other = nn.Linear(96, 64), nn.Linear(96, 64)
    make = lambda like: loaded(bnb.nn.Linear8bitLt(96, 64, has_fp16_weights=False, threshold=6.0), like)  # noqa: E731
    theirs, ready = make(other), make(layer)
    state = lq.to_bitsandbytes_format(layer.weight.detach(), BitsAndBytesConfig(outlier_threshold=0))
    assert theirs.load_state_dict({**state, "bias": layer.bias.detach()}, strict=True) == ([], [])
    x = randn(4, 96).half()
    with torch.no_grad():
        assert torch.equal(theirs(x), ready(x))
    assert torch.equal(lq.from_bitsandbytes_format(ready.state_dict()).codes, state["weight"])


def as_transformers_builds(layer: nn.Linear, fields: dict[str, object]) -> nn.Module:
    """Return the layer that transformers puts in for ``BitsAndBytesConfig(**fields)``: its replace_with_bnb_linear."""
    size = layer.in_features, layer.out_features, layer.bias is not None
    if fields.get("load_in_8bit"):
        return loaded(bnb.nn.Linear8bitLt(*size, has_fp16_weights=False, threshold=fields["llm_int8_threshold"]), layer)
    options = {
        "compute_dtype": fields.get("bnb_4bit_compute_dtype", torch.float32),
        "compress_statistics": fields.get("bnb_4bit_use_double_quant", False),
        "quant_type": fields.get("bnb_4bit_quant_type", "fp4"),
    }
    return loaded(bnb.nn.Linear4bit(*size, **options), layer)


FOUR_BIT = [
    ("BitsAndBytesConfig(load_in_4bit=True)", "fp4"),
    ('BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")', "nf4"),
    (
        'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)',
        QuantizationConfig("nf4", bnb=NESTED),
    ),
]


@row(*(call for call, _ in FOUR_BIT))
@pytest.mark.parametrize(("call", "plan"), FOUR_BIT)
def test_4bit_config_of_transformers(call: str, plan: QuantizationConfig | str) -> None:
    fields = eval(call, {"BitsAndBytesConfig": dict})
    if importlib.util.find_spec("transformers") is not None:  # the defaults written down above are its own
        import transformers

        real = eval(call, {"BitsAndBytesConfig": transformers.BitsAndBytesConfig})
        assert real.bnb_4bit_use_double_quant == fields.get("bnb_4bit_use_double_quant", False)
        assert real.bnb_4bit_quant_type == fields.get("bnb_4bit_quant_type", "fp4")
    layer = nn.Linear(256, 64)
    state = as_transformers_builds(layer, fields).state_dict()
    assert_same_bytes(converted(layer, plan), state, nested=isinstance(plan, QuantizationConfig))


@row("bnb_4bit_compute_dtype=torch.bfloat16")
def test_compute_dtype_of_transformers() -> None:
    layer, x = nn.Linear(256, 64), randn(8, 256).bfloat16()
    fields = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    theirs, ours = as_transformers_builds(layer, fields), converted(layer, "nf4").bfloat16()
    with torch.no_grad():
        expected, result = theirs.train()(x), ours(x)
    assert expected.dtype == result.dtype == torch.bfloat16
    assert lq.sqnr(expected.float(), result.float()) > 40  # both round to 8 bits of mantissa
    assert_same_bytes(ours, theirs.state_dict(), nested=False)  # .bfloat16() leaves scales alone


@row('BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=6.0, llm_int8_skip_modules=["lm_head"])')
def test_8bit_config_of_transformers(net: Net) -> None:
    theirs = as_transformers_builds(net.body, {"load_in_8bit": True, "llm_int8_threshold": 6.0})
    ours = lq.convert(lq.prepare(net, QuantizationPlan([LayerRule("lm_head")], base="llm_int8")))
    assert quantized(ours) == ["body"]
    state = theirs.state_dict()
    assert torch.equal(ours.body.codes, state["weight"])
    assert torch.equal(ours.body.scale, state["SCB"])
    assert ours.body.input_format.outlier_threshold == theirs.state.threshold == 6.0


def test_a_table_is_read() -> None:
    text = "x\n\n| `bitsandbytes` | here |\n|---|---|\n| `f(x)`, `g()` | `h(x)` |\n| `k` | no |\n\n| a | `b` |\n"
    assert [calls(first) for first, _ in columns(text)] == [["f(x)", "g()"], ["k"]]
    assert columns("| a | b |\n|---|---|\n| `c` | `d` |\n") == []


def test_every_row_of_the_readme_is_tried() -> None:
    rows = columns(README.read_text(encoding="utf-8"))
    assert {call for first, _ in rows for call in calls(first)} == TRIED.keys()


def test_our_side_of_the_table_is_code_that_runs() -> None:
    text = README.read_text(encoding="utf-8")
    names = {name: getattr(lq, name) for name in lq.__all__}
    x = randn(8, 64)
    names |= {"nn": nn, "x": x, "quantized": lq.quantize_4bit(x), "state": lq.to_bitsandbytes_format(x)}
    (defined,) = re.findall(r"`nested` is\s+`([^`]+)`", text)
    assert names.setdefault("nested", eval(defined, dict(names))) == NESTED
    found = [call for _, second in columns(text) for call in calls(second)]
    assert len(found) > 20
    for call in found:
        names["model"] = Net()
        value = eval(call, dict(names))
        if isinstance(value, (QuantizationPlan, QuantizationConfig, str)):
            assert quantized(lq.convert(lq.prepare(names["model"], value))), call
