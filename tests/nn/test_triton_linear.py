"""Converted layers in compiled graphs: packed weights stay packed, by the ops whose kernels a GPU has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensors import randn
from torch import Tensor, nn

import lightning_qat as lq
from lightning_qat.nn import triton_linear
from lightning_qat.ops.fake_quantize_cuda import HAS_TRITON

DEVICE = "cuda" if torch.cuda.is_available() and HAS_TRITON else "cpu"

#: Config -> the ops of the graph.
CASES: dict[str, tuple[Any, set[str]]] = {
    "w4a16": (lq.QATConfig("int4", group_size=32, activation_bits=None), {"w4a16_matmul"}),
    "asymmetric": (lq.QATConfig("int4", group_size=32, activation_bits=None, symmetric=False), {"w4a16_matmul"}),
    "per channel": (lq.QATConfig("int4", per_channel=True, activation_bits=None), {"w4a16_matmul"}),
    "per tensor": (lq.QATConfig("int4", activation_bits=None, symmetric=False), {"w4a16_matmul"}),
    "nf4": (lq.QATConfig("nf4", activation_bits=None), {"w4a16_matmul"}),
    "nested": (
        lq.QATConfig("nf4", activation_bits=None, bnb=lq.BitsAndBytesConfig(bits=4, nested_quantization=True)),
        {"codebook_dequantize", "w4a16_matmul"},
    ),
    "fp4": (lq.QATConfig("fp4", activation_bits=None, group_size=32), {"w4a16_matmul"}),
    "int8_dynamic": ("int8_dynamic", {"token_quantize", "w8a8_matmul"}),
    "int8": ("int8", {"quantize_packed", "w8a8_matmul"}),
    "symmetric": (lq.QATConfig("int8", activation_symmetric=True), {"quantize_packed", "w8a8_matmul"}),
}


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    torch.compiler.reset()  # which counts how often one forward was compiled


@pytest.fixture
def all_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU a graph gets all ops on the CPU, whose kernels are their definitions or as exact."""
    monkeypatch.setattr(triton_linear, "_INT8_ON_CPU", True)


class Seen:
    """A backend that keeps what the graphs call, and runs them as they are."""

    def __init__(self) -> None:
        self.ops: set[str] = set()
        self.graphs = 0

    def __call__(self, module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs += 1
        names = [str(node.target) for node in module.graph.nodes if node.op == "call_function"]
        self.ops |= {name.split(".")[1] for name in names if name.startswith("lightning_qat.")}
        self.ops |= {name for name in names if "linear" in name}
        return module.forward


def converted(config: object, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48))
    return lq.quantize_model(model, config, calibration=[randn(16, 64)])[0].to(dtype).to(DEVICE)


def exact(layer: Any, x: Tensor) -> Tensor:
    return nn.functional.linear(layer.quantized_input(x).double(), layer.weight.double(), layer.bias.double())


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float32) for name in CASES), ("nf4", torch.bfloat16), ("int8", torch.bfloat16)]
)
def test_the_graph_holds_the_ops_and_computes_the_same(all_ops: None, name: str, dtype: torch.dtype) -> None:
    config, ops = CASES[name]
    layer, seen = converted(config, dtype), Seen()
    x = randn(2, 9, 64, seed=1).to(dtype).to(DEVICE)
    with torch.no_grad():
        actual, expected = torch.compile(layer, backend=seen, fullgraph=True)(x), exact(layer, x)
    assert seen.ops == ops
    assert (actual.dtype, actual.shape) == (dtype, expected.shape)
    bound = {torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]
    assert (actual.double() - expected).abs().max() <= bound * expected.abs().max()


@pytest.mark.parametrize("name", ["w4a16", "nf4", "int8_dynamic", "int8"])
def test_any_batch_in_one_graph(all_ops: None, name: str) -> None:
    layer, seen = converted(CASES[name][0]), Seen()
    compiled = torch.compile(layer, backend=seen, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for rows in (5, 2, 33):
            x = randn(rows, 64, seed=rows).to(DEVICE)
            torch.testing.assert_close(compiled(x).double(), exact(layer, x), rtol=1e-5, atol=1e-5)
        assert compiled(randn(0, 64).to(DEVICE)).shape == (0, 48)
    assert seen.graphs <= 2


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_the_compiler_that_users_have(all_ops: None, name: str) -> None:
    layer = converted(CASES[name][0])
    x = randn(4, 64, seed=1).to(DEVICE)
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True)(x)
        torch.testing.assert_close(compiled.double(), exact(layer, x), rtol=1e-5, atol=1e-5)


def test_codes_that_change_are_computed_with(all_ops: None) -> None:
    layer, other = converted(CASES["int8"][0]), converted(CASES["int8"][0])
    x, compiled = randn(4, 64, seed=1).to(DEVICE), torch.compile(layer, backend=Seen(), fullgraph=True)
    with torch.no_grad():
        compiled(x)
        other.weight_packed.copy_(other.weight_packed.flip(0))
        layer.load_state_dict(other.state_dict())
        torch.testing.assert_close(compiled(x).double(), exact(other, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wanted", ["gradient", "other dtype", "other scheme"])
def test_what_has_no_op_takes_the_float_form(all_ops: None, wanted: str) -> None:
    layer = converted("int8_weight_only" if wanted == "other scheme" else CASES["nf4"][0])
    x = randn(4, 64, seed=1).to(DEVICE).requires_grad_(wanted == "gradient")
    seen = Seen()
    run = torch.compile(layer.double() if wanted == "other dtype" else layer, backend=seen, fullgraph=True)
    with torch.set_grad_enabled(wanted == "gradient"):
        actual = run(x.double() if wanted == "other dtype" else x)
    assert not {"w4a16_matmul", "w8a8_matmul"} & seen.ops
    torch.testing.assert_close(actual.double(), exact(layer, x.to(actual.dtype)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["nf4", "int8", "int8_dynamic"])
@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_program_has_the_float_form(all_ops: None, name: str, strict: bool) -> None:
    layer, x = converted(CASES[name][0]), randn(4, 64).to(DEVICE)
    with torch.no_grad():  # not a layer alone: without strict, PyTorch miscounts buffers of the root that are None
        program = torch.export.export(nn.Sequential(layer), (x,), strict=strict)
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert not [name for name in names if "matmul" in name or "quantize_packed" in name or "token_quantize" in name]
    assert [name for name in names if "linear" in name]


@pytest.mark.parametrize("name", ["int8", "int8_dynamic", "w4a16", "nf4"])
@pytest.mark.parametrize("fast", [True, False])
def test_a_graph_for_the_cpu_has_integer_products_where_they_are_fast(
    monkeypatch: pytest.MonkeyPatch, name: str, fast: bool
) -> None:
    monkeypatch.setattr(triton_linear, "_INT8_ON_CPU", fast)
    layer, x, seen = converted(CASES[name][0]).cpu(), randn(4, 64, seed=1), Seen()
    with torch.no_grad():
        actual = torch.compile(layer, backend=seen, fullgraph=True)(x)
    assert ("w8a8_matmul" in seen.ops) == (fast and name.startswith("int8"))
    assert ("w4a16_matmul" in seen.ops) == (name in ("w4a16", "nf4"))
    torch.testing.assert_close(actual.double(), exact(layer, x), rtol=1e-5, atol=1e-5)


def wide(name: str, dtype: torch.dtype) -> nn.Module:
    """Return a layer large enough for the CPU's kernels for few tokens."""
    model = nn.Sequential(nn.Linear(512, 256))
    return lq.quantize_model(model, CASES[name][0], calibration=[randn(16, 512)])[0].to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["w4a16", "asymmetric", "per channel", "per tensor", "nf4", "nested", "fp4", "int8"])
def test_a_graph_for_the_cpu_has_the_bits_of_the_converted_layer(all_ops: None, name: str, dtype: torch.dtype) -> None:
    """Few tokens on the weight as it is stored; many by the library, where the order of sums is its own."""
    layer = wide(name, dtype)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for tokens in (5, 1, 2, 8, 16):
            x = randn(tokens, 512, seed=tokens).to(dtype)
            assert torch.equal(compiled(x), layer(x)), tokens
        x = randn(300, 512).to(dtype)
        torch.testing.assert_close(compiled(x), layer(x))


def test_autocast_takes_the_float_form(all_ops: None) -> None:
    layer, x, seen = converted("int8"), randn(4, 64, seed=1).to(DEVICE), Seen()
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        assert torch.compile(layer, backend=seen, fullgraph=True)(x).dtype == torch.bfloat16
    assert "w8a8_matmul" not in seen.ops
