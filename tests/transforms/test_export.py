"""torch.export of a converted model, in this process and in a fresh one."""

import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lightning_qat as lq


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.up = nn.ConvTranspose2d(3, 3, 2, stride=2)
        self.head = nn.Linear(3 * 256, 5)

    def forward(self, image, scale=1.0):
        image = self.up(torch.relu(image + self.bn(self.conv(image))))
        return {"logits": self.head(image.flatten(1)) * scale}


@pytest.mark.parametrize(
    "plan", ["int8", "int8_dynamic", "w4a8", "int8_weight_only", "nf4", "fp4", "dynamic_tree", "llm_int8"]
)
@pytest.mark.parametrize("strict", [True, False])
def test_export_keeps_the_numbers_at_any_batch(plan, strict):
    torch.manual_seed(0)
    model = lq.prepare(Residual(), plan)
    lq.calibrate(model, [torch.randn(2, 3, 8, 8)])
    converted = lq.convert(model)
    shapes = {"image": {0: torch.export.Dim("batch", min=1, max=64)}}
    program = torch.export.export(converted, (torch.randn(2, 3, 8, 8),), dynamic_shapes=shapes, strict=strict)
    x = torch.randn(7, 3, 8, 8)
    # int8_dynamic and int8: an integer kernel may run outside the exported program
    assert lq.sqnr(converted(x)["logits"], program.module()(x)["logits"]) > 60


def test_an_exported_model_runs_in_a_fresh_process(tmp_path):
    torch.manual_seed(0)
    model = lq.prepare(Residual(), "int8")
    lq.calibrate(model, [torch.randn(2, 3, 8, 8)])
    x = torch.randn(2, 3, 8, 8)
    program = torch.export.export(lq.convert(model), (x,))
    torch.export.save(program, tmp_path / "model.pt2")
    save_file({"x": x, "y": program.module()(x)["logits"]}, tmp_path / "io.safetensors")
    code = """
        import sys, torch, lightning_qat  # registers the operators
        from safetensors.torch import load_file
        io = load_file(sys.argv[2])
        assert torch.equal(torch.export.load(sys.argv[1]).module()(io["x"])["logits"], io["y"])
    """
    command = [
        sys.executable,
        "-c",
        textwrap.dedent(code),
        str(tmp_path / "model.pt2"),
        str(tmp_path / "io.safetensors"),
    ]
    subprocess.run(command, check=True, timeout=120)
