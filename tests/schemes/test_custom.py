"""A format of one's own: the README's example, and one that another installed package brings."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

import lightning_qat as lq
from lightning_qat.schemes import Scheme, get_scheme
from lightning_qat.schemes.base import _REGISTRY
from lightning_qat.testing import check_scheme
from lightning_qat.validation import SCHEME_BITS

README = Path(__file__).parents[2] / "README.md"


def readme_example() -> str:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.S)
    (example,) = [block for block in blocks if "@register_scheme(" in block]
    return example


@pytest.fixture
def ternary():
    """Run the README's example; forget its scheme afterwards."""
    known = set(_REGISTRY)
    exec(compile(readme_example(), str(README), "exec"), {"__name__": "readme_example"})
    (name,) = set(_REGISTRY) - known
    yield name
    del _REGISTRY[name], SCHEME_BITS[name]


def test_the_example_is_short_and_keeps_the_contract(ternary: str) -> None:
    lines = [line for line in readme_example().splitlines() if line.strip()]
    assert len(lines) <= 30
    check_scheme(ternary)


def test_the_example_quantizes_trains_converts_and_saves(ternary: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 16)
    held = lq.quantize(weight, lq.QuantizationConfig(ternary, per_channel=True))
    assert held.codes.unique().numel() <= 3
    assert held.packed.numel() == 8 * 16 // 4  # two bits each
    build = lambda: nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))  # noqa: E731
    model, x = build(), torch.randn(32, 16)
    lq.prepare(model, lq.QATConfig(ternary, per_channel=True, activation_bits=8))
    lq.calibrate(model, [x])
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    converted = lq.convert(model.eval(), verify=[x])
    lq.save_quantized(converted, tmp_path / "model")
    loaded = lq.load_quantized(tmp_path / "model", build())
    assert torch.equal(loaded(x), converted(x))
    assert lq.quantization_statistics(loaded)["0"].scheme == ternary


def test_a_taken_name_and_an_incomplete_scheme_are_refused() -> None:
    with pytest.raises(ValueError, match="'nf4' is registered already"):

        @lq.register_scheme("nf4")
        class Mine(Scheme):
            pass

    with pytest.raises(TypeError, match="abstract"):

        @lq.register_scheme("incomplete")
        class Incomplete(Scheme):
            pass

    assert "incomplete" not in _REGISTRY
    assert "incomplete" not in SCHEME_BITS
    with pytest.raises(TypeError, match="subclasses of Scheme"):
        lq.register_scheme("function")(lambda: None)
    with pytest.raises(ValueError, match="bits"):
        lq.register_scheme("wide", bits=17)


def test_an_unknown_scheme_lists_the_known_ones_nearest_first() -> None:
    with pytest.raises(ValueError, match="'int8'"):
        lq.QuantizationConfig("int9")
    with pytest.raises(ValueError, match="no implementation"):
        get_scheme("nowhere")


PACKAGE = '''
import torch
from lightning_qat.schemes import IntegerScheme, register_scheme

@register_scheme("powers", bits=(4, 2, 8))
class Powers(IntegerScheme):
    """Integers whose scale is a power of two."""

    def parameters(self, low, high, fmt):
        scale, zero_point = super().parameters(low, high, fmt)
        return torch.exp2(torch.ceil(torch.log2(scale))), zero_point
'''

USER = """
import sys, torch
from torch import nn
import lightning_qat as lq
assert "elsewhere" not in sys.modules
held = lq.quantize(torch.randn(4, 8), lq.QuantizationConfig("powers", per_channel=True))
assert torch.equal(held.scale, torch.exp2(torch.log2(held.scale).round()))
from lightning_qat.testing import check_scheme
check_scheme("powers")
model = lq.prepare(nn.Sequential(nn.Linear(8, 4)), lq.QATConfig("powers", activation_bits=None, per_channel=True))
lq.save_quantized(lq.convert(model), sys.argv[1])
"""

READER = """
import sys, torch
from torch import nn
import lightning_qat as lq
model = lq.load_quantized(sys.argv[1], nn.Sequential(nn.Linear(8, 4)))
assert model(torch.randn(2, 8)).shape == (2, 4)
assert "elsewhere" in sys.modules
"""


def test_an_installed_package_brings_a_format(tmp_path: Path) -> None:
    site = tmp_path / "site"
    info = site / "elsewhere-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[lightning_qat.schemes]\npowers = elsewhere\n")
    (site / "elsewhere.py").write_text(textwrap.dedent(PACKAGE))
    environment = {**os.environ, "PYTHONPATH": str(site)}
    for script in (USER, READER):
        command = [sys.executable, "-c", script, str(tmp_path / "model")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    recipe = [
        sys.executable, "-m", "lightning_qat", "train", "quantization.scheme=powers", "quantization.bits=4",
        "++trainer.max_epochs=1", "++trainer.limit_train_batches=3", f"hydra.run.dir={tmp_path / 'run'}",
    ]  # fmt: skip
    done = subprocess.run(recipe, env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert '"scheme": "powers"' in next((tmp_path / "run").rglob("manifest.json")).read_text()
