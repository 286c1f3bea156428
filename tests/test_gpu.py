"""What only a GPU can show: training there, resuming, no waiting for the host, converted layers as on the CPU."""

from __future__ import annotations

import copy
from pathlib import Path

import lightning as L
import pytest
import torch
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_qat as lq

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

LEARNED = lq.QATConfig(bits=4, activation_bits=8, learnable_step_size=True)
#: Outliers by magnitude, as bitsandbytes finds them, and not by a quantile of the columns.
OUTLIERS = lq.QATConfig("llm_int8", bnb=lq.BitsAndBytesConfig(outlier_threshold=1.5))
NESTED = lq.QATConfig("nf4", activation_bits=None, bnb=lq.BitsAndBytesConfig(bits=4, nested_quantization=True))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(
        *layers, nn.Conv2d(32, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)
    )


class Classifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-2, momentum=0.9)


def loader() -> DataLoader[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 10, (256,), generator=generator)
    images = torch.randn(256, 3, 16, 16, generator=generator) + (labels[:, None, None, None].float() - 5) / 5
    return DataLoader(TensorDataset(images, labels), batch_size=64)


def fitted(
    plan: object, epochs: int = 3, ckpt_path: str | None = None, **trainer: object
) -> tuple[L.Trainer, Classifier]:
    torch.manual_seed(0)
    module = Classifier()
    run = L.Trainer(
        accelerator="gpu", devices=1, max_epochs=epochs, callbacks=[lq.QuantizationAwareTraining(plan)], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **trainer,
    )  # fmt: skip
    run.fit(module, loader(), ckpt_path=ckpt_path)
    return run, module


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("plan", ["int8", LEARNED], ids=["int8", "learned"])
def test_what_trains_there_is_what_converts(plan: object, precision: str) -> None:
    _, module = fitted(plan, precision=precision)
    module = module.cuda().eval()
    converted = lq.convert(copy.deepcopy(module))
    x = loader().dataset.tensors[0].cuda()
    with torch.no_grad():
        assert lq.sqnr(module(x), converted(x)) > 40  # the library's convolutions are TF32's


def test_a_resumed_run_is_the_same(tmp_path) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        _, whole = fitted("int8", epochs=4)
        run, _ = fitted("int8", epochs=2)
        run.save_checkpoint(tmp_path / "half.ckpt")
        _, resumed = fitted("int8", epochs=4, ckpt_path=str(tmp_path / "half.ckpt"))
    finally:
        torch.use_deterministic_algorithms(False)
    expected = whole.state_dict()
    for name, value in resumed.state_dict().items():
        assert not isinstance(value, Tensor) or torch.equal(value.cpu(), expected[name].cpu()), name


@pytest.mark.parametrize(
    "plan",
    ["int8", "w4a8", LEARNED, "nf4", "fp4", "dynamic_tree", "llm_int8", OUTLIERS],
    ids=["int8", "w4a8", "learned", "nf4", "fp4", "dynamic_tree", "llm_int8", "llm_int8 threshold"],
)
def test_a_step_does_not_wait_for_the_gpu(plan: object) -> None:
    x = torch.randn(16, 3, 16, 16, device="cuda")
    model = lq.prepare(network().cuda(), plan)
    lq.calibrate(model, [x])
    model.train()
    for mode in ("default", "default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            model(x).square().mean().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "plan",
    ["nf4", "fp4", "dynamic_tree", "llm_int8", OUTLIERS, NESTED],
    ids=["nf4", "fp4", "dynamic_tree", "llm_int8", "llm_int8 threshold", "nf4 nested"],
)
def test_a_layer_trains_on_the_values_that_it_has_on_a_cpu(plan: object, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    here = lq.prepare(nn.Sequential(nn.Linear(130, 67)).to(dtype), plan)[0]
    there, x = copy.deepcopy(here).cuda(), torch.randn(3, 40, 130).to(dtype)
    torch.use_deterministic_algorithms(True)
    try:
        results = []
        for layer in (here, there):
            weight = layer.weight_quantizer(layer.weight)
            gradient = torch.autograd.grad(weight, layer.weight, torch.ones_like(weight))[0]
            results.append([weight, gradient, layer.quantized_input(x.to(weight.device))])
    finally:
        torch.use_deterministic_algorithms(False)
    for one, other in zip(*results, strict=True):
        if plan is NESTED:  # the mean of the scales is added up in another order
            assert lq.sqnr(one.float(), other.cpu().float()) > 40
        else:
            assert torch.equal(one, other.cpu())


PRESETS = ("int8", "int8_dynamic", "int8_weight_only", "llm_int8", "w4a8", "w4a16", "nf4", "fp4", "dynamic_tree")


@pytest.mark.parametrize("preset", PRESETS)
def test_converted_layers_give_what_they_give_on_a_cpu(preset: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).cuda()
    x = torch.randn(600, 256, device="cuda")
    prepared = lq.prepare(model, preset)
    lq.calibrate(prepared, [x])
    converted = lq.convert(prepared.eval())
    for rows in (1, 2, 5, 37, 600):  # each has a kernel of its own
        with torch.no_grad():
            assert lq.sqnr(copy.deepcopy(converted).cpu()(x[:rows].cpu()), converted(x[:rows]).cpu()) > 100
            half = copy.deepcopy(converted).bfloat16()(x[:rows].bfloat16())
            assert lq.sqnr(converted(x[:rows]), half.float()) > (30 if "int8" in preset or "8" in preset else 40)


@pytest.mark.parametrize("preset", ["int8_dynamic", "w4a16", "nf4"])
def test_a_cuda_graph_holds_a_converted_layer(preset: str) -> None:
    x = torch.randn(4, 256, device="cuda", dtype=torch.bfloat16)
    layer = lq.convert(lq.prepare(nn.Sequential(nn.Linear(256, 256)), preset)).cuda().bfloat16().eval()
    with torch.no_grad():
        expected = layer(x)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            layer(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = layer(x)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(result, expected)


@pytest.mark.parametrize("method", ["rtn", "clip", "gptq", "awq"])
def test_post_training_quantization_there(method: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)).cuda()
    batches = [torch.randn(32, 64, device="cuda") for _ in range(3)]
    config = lq.QuantizationConfig("gptq", group_size=32)
    found, expected = (
        lq.quantize_model(m, config, b, method)(b[0])
        for m, b in ((model, batches), (copy.deepcopy(model).cpu(), [t.cpu() for t in batches]))
    )
    assert lq.sqnr(expected, found.cpu()) > 25  # sums of another order tip a few codes over


def test_weights_are_streamed_there(tmp_path: Path) -> None:
    def blocks() -> nn.Sequential:
        parts = (nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)) for _ in range(3))
        return nn.Sequential(*parts)

    torch.manual_seed(0)
    model = blocks()
    save_model(model, str(tmp_path / "model.safetensors"))
    with lq.without_weights():
        empty = blocks()
    batches, config = [torch.randn(32, 64, device="cuda")], lq.QuantizationConfig("gptq", group_size=32)
    files = lq.WeightFiles(tmp_path, device="cuda")
    found = lq.quantize_model(empty, config, batches, "gptq", weights=files)
    expected = lq.quantize_model(model.cuda(), config, batches, "gptq")
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
