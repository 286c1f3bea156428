"""Every number format in a whole model: trained by a Trainer, converted, saved, loaded, in half precision.

What is checked is exact: the codes that trained are those that ship, and a loaded model computes the same bits.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import lightning as L
import pytest
import torch
from safetensors.torch import load_file
from tensors import randn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

import lightning_qat as lq
from lightning_qat import BitsAndBytesConfig, LayerRule, QATConfig, QuantizationConfig, QuantizationPlan
from lightning_qat.nn import FoldedBatchNorm, QuantizedLayer
from lightning_qat.testing import assert_resume_exact


def blocks(scheme: str, size: int, nested: bool = False, rule: str = "cpu") -> QATConfig:
    bits = 8 if scheme == "dynamic_tree" else 4
    bnb = BitsAndBytesConfig(bits=bits, block_size=size, nested_quantization=nested, rule=rule)
    return QATConfig(scheme, activation_bits=None, bnb=bnb)


CONFIGS: dict[str, QATConfig] = {
    **lq.PRESETS,
    "nf4 nested": blocks("nf4", 64, nested=True),
    "fp4 nested, rule of CUDA": blocks("fp4", 32, nested=True, rule="cuda"),
    "dynamic_tree nested": blocks("dynamic_tree", 128, nested=True),
    "llm_int8, a quantile": QATConfig("llm_int8", bnb=BitsAndBytesConfig(outlier_threshold=0.9)),
    "nf4, 8-bit inputs": QATConfig("nf4", activation_bits=8, bnb=BitsAndBytesConfig(bits=4, block_size=64)),
    "int4 groups, asymmetric": QATConfig("int4", symmetric=False, group_size=32, activation_bits=None),
    **{f"{b} bit": QATConfig("int8", bits=b, per_channel=True, activation_bits=None) for b in (2, 3, 5, 6, 7)},
}
#: What shares a scale: of the Linear, where it is not an output channel.
GRANULARITY = {
    "w4a16": "group of 128", "nf4": "block of 64", "fp4": "block of 64", "dynamic_tree": "block of 256",
    "nf4 nested": "block of 64", "fp4 nested, rule of CUDA": "block of 32", "dynamic_tree nested": "block of 128",
    "nf4, 8-bit inputs": "block of 64", "int4 groups, asymmetric": "group of 32",
}  # fmt: skip


class Tagged(L.LightningModule):
    """An image and a token: convolution, BatchNorm, embedding and head."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv, self.norm = nn.Conv2d(8, 16, 4, bias=False), nn.BatchNorm2d(16)
            self.tokens, self.head = nn.Embedding(20, 128), nn.Linear(128, 5)

    def forward(self, image: Tensor, token: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.conv(image))).flatten(1) + self.tokens(token))

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(*batch[:2]), batch[2])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        self.log("val/loss", F.cross_entropy(self(*batch[:2]), batch[2]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


def data(samples: int = 24) -> TensorDataset:
    image = randn(samples, 8, 5, 7)
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(image, torch.randint(20, (samples,), generator=generator), (image.mean((1, 2, 3)) > 0).long())


def batches() -> list[tuple[Tensor, Tensor]]:
    return [(image, token) for image, token, _ in DataLoader(data(), 8)]


def plan_of(config: QATConfig) -> QuantizationPlan:
    """Return the plan: every layer, and the embedding as the scheme allows it, by rule."""
    weight = config.weight_config()
    bnb = config.bnb
    if bnb is not None and weight.scheme != "llm_int8":  # single rows are looked up: no block may span two
        weight = replace(weight, group_size=32, bnb=replace(bnb, nested_quantization=False))
    return QuantizationPlan([LayerRule("tokens", weight)], base=config)


def fit(config: QATConfig, folder: Path, steps: int = 6, seed: int = 0) -> tuple[Tagged, lq.QuantizationAwareTraining]:
    model, callback = Tagged(seed), lq.QuantizationAwareTraining(plan_of(config))
    L.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[callback], default_root_dir=folder, num_sanity_val_steps=0,
    ).fit(model, DataLoader(data(), 4))  # fmt: skip
    return model.eval(), callback


@torch.no_grad()
def output(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return what a model computes where no gradient is wanted, so that integer kernels may be taken."""
    return model(*batch)


def layers_of(model: nn.Module) -> dict[str, QuantizedLayer]:
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLayer)}


@pytest.mark.parametrize("name", CONFIGS)
def test_trained_converted_saved_and_loaded(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    model, callback = fit(config, tmp_path)
    assert callback.certificate is not None
    shipped = lq.convert(model, verify=batches())
    layers = layers_of(shipped)
    assert set(layers) == {"conv", "tokens", "head"}
    for key in ("tokens", "head"):  # signs of a convolution's codes may have turned where BatchNorm was folded in
        assert torch.equal(layers[key].codes, getattr(model, key).weight_codes())
        assert torch.equal(layers[key].weight, getattr(model, key).quantized_weight())
    assert lq.sqnr(output(model, batches()[0]), output(shipped, batches()[0])) > 40
    lq.save_quantized(shipped, tmp_path / "model")
    loaded = lq.load_quantized(tmp_path / "model", Tagged(seed=9))
    for batch in batches():
        assert torch.equal(output(loaded, batch), output(shipped, batch))
    assert {key: layer.execution for key, layer in layers_of(loaded).items()} == {
        key: layer.execution for key, layer in layers.items()
    }
    for statistics in (lq.quantization_statistics(model), lq.quantization_statistics(loaded, model)):
        head = statistics["head"]
        assert head.granularity == GRANULARITY.get(name, "channel")
        assert (head.scheme, head.bits) == (config.scheme, config.bits)
        assert head.sqnr_db == pytest.approx(6 * config.bits - 5, abs=6)  # six decibels a bit
        json.dumps(head.to_dict(), allow_nan=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tagged]:
    """Return models after two steps, made when they are asked for."""

    class Made(dict[str, Tagged]):
        def __missing__(self, name: str) -> Tagged:
            self[name], _ = fit(CONFIGS[name], tmp_path_factory.mktemp("fit"), steps=2)
            return self[name]

    return Made()


@pytest.mark.parametrize("name", ["nf4", "nf4 nested", "fp4", "dynamic_tree", "llm_int8", "3 bit", "w4a16"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(name: str, dtype: torch.dtype, trained: dict[str, Tagged], tmp_path: Path) -> None:
    model = trained[name]
    shipped = lq.convert(model)
    image, token = batches()[0]
    expected = output(shipped, (image, token))
    scales = {key: layer.weight_scale.clone() for key, layer in layers_of(shipped).items()}
    half = shipped.to(dtype)
    for key, layer in layers_of(half).items():
        assert layer.weight_scale.dtype == scales[key].dtype
        assert torch.equal(layer.weight_scale, scales[key])
        assert layer.weight.dtype == dtype
    result = output(half, (image.to(dtype), token))
    assert result.dtype == dtype
    assert lq.sqnr(expected, result.float()) > (45 if dtype == torch.float16 else 28)
    lq.save_quantized(half, tmp_path / "half")
    loaded = lq.load_quantized(tmp_path / "half", Tagged(seed=9))
    assert torch.equal(output(loaded, (image.to(dtype), token)), result)


@pytest.mark.parametrize("name", ["nf4", "fp4 nested, rule of CUDA", "dynamic_tree", "llm_int8"])
@torch.no_grad()
def test_a_model_that_trains_in_bfloat16(name: str) -> None:
    model = lq.prepare(Tagged().bfloat16(), plan_of(CONFIGS[name]))
    image, token = batches()[0]
    with torch.enable_grad():
        model(image.bfloat16(), token).float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    shipped = lq.convert(model)
    assert torch.equal(shipped.head.weight, model.head.quantized_weight())
    assert lq.sqnr(model(image.bfloat16(), token).float(), shipped(image.bfloat16(), token).float()) > 30


@pytest.mark.parametrize("name", ["nf4 nested", "fp4 nested, rule of CUDA", "dynamic_tree nested"])
def test_nested_scales_are_saved_as_codes(name: str, trained: dict[str, Tagged], tmp_path: Path) -> None:
    shipped = lq.convert(trained[name])
    lq.save_quantized(shipped, tmp_path / "model")
    saved = load_file(tmp_path / "model" / "model.safetensors")
    for key in ("conv", "head"):
        assert saved[f"{key}.weight_scale"].dtype == torch.uint8
        assert saved[f"{key}.weight_scale_absmax"].dtype == torch.float32
        assert saved[f"{key}.weight_scale_offset"].shape == ()
    assert saved["tokens.weight_scale"].dtype == torch.float32
    assert "tokens.weight_scale_absmax" not in saved
    loaded = lq.load_quantized(tmp_path / "model", Tagged(seed=9))
    assert torch.equal(loaded.conv.scale, shipped.conv.scale)
    flat = trained[name].head.weight_quantizer.parameters_for(trained[name].head.weight)[0]
    assert not torch.equal(loaded.head.scale, flat)  # what is computed with are the stored scales
    torch.testing.assert_close(loaded.head.scale, flat, rtol=0.1, atol=0)


def test_each_folder_says_its_own_format(trained: dict[str, Tagged], tmp_path: Path) -> None:
    names = ["nf4", "nf4 nested", "dynamic_tree", "llm_int8", "int8"]
    outputs = {}
    for name in names:
        shipped = lq.convert(trained[name])
        outputs[name] = output(shipped, batches()[0])
        lq.save_quantized(shipped, tmp_path / name)
    for name in reversed(names):
        loaded = lq.load_quantized(tmp_path / name, Tagged(seed=3))
        assert loaded.head.weight_format.scheme == CONFIGS[name].scheme
        assert torch.equal(output(loaded, batches()[0]), outputs[name])
    with pytest.raises(lq.QuantizedFileError, match="already prepared or converted"):
        lq.load_quantized(tmp_path / "nf4", loaded)
    with pytest.raises(lq.QuantizedFileError, match="already prepared or converted"):
        lq.load_quantized(tmp_path / "nf4", lq.prepare(Tagged(), plan_of(CONFIGS["fp4"])))


@pytest.mark.parametrize(("scheme", "group"), [("nf4", None), ("dynamic_tree", None), ("fp4", 48)])
def test_an_embedding_whose_rows_end_inside_a_block_is_refused(scheme: str, group: int | None) -> None:
    rule = LayerRule("tokens", QuantizationConfig(scheme, group_size=group or 256))
    with pytest.raises(ValueError, match="blocks have to divide a row of 128"):
        lq.prepare(Tagged(), QuantizationPlan([rule]))
    with pytest.raises(ValueError, match="scales cannot be nested"):
        lq.prepare(Tagged(), QuantizationPlan([LayerRule("tokens", blocks(scheme, 64, nested=True).weight_config())]))


@pytest.mark.parametrize("name", ["nf4", "nf4 nested", "fp4", "dynamic_tree", "llm_int8"])
def test_frozen_scales_stand_still(name: str, tmp_path: Path) -> None:
    model, _ = fit(replace(CONFIGS[name], freeze_step=3), tmp_path)
    for key in ("conv", "tokens", "head"):
        layer = getattr(model, key)
        held = layer.weight_quantizer.scale
        now = layer.weight_quantizer.scheme.parameters_of(layer.weight, layer.weight_quantizer.format)[0]
        assert layer.weight_quantizer.frozen
        assert (held != now).any(), key  # weights moved on
    shipped = lq.convert(model, verify=batches())
    assert torch.equal(shipped.head.codes, model.head.weight_codes())
    if not shipped.head.weight_format.nested:
        assert torch.equal(shipped.head.scale, model.head.weight_quantizer.scale)
    assert torch.equal(shipped.head.weight, model.head.quantized_weight())


@pytest.mark.parametrize("name", ["nf4", "nf4 nested", "fp4", "dynamic_tree", "dynamic_tree, CUDA", "llm_int8"])
def test_pruned_weights_stay_zero(name: str, tmp_path: Path) -> None:
    config = blocks("dynamic_tree", 256, rule="cuda") if name.endswith("CUDA") else CONFIGS[name]
    model = Tagged()
    prune.l1_unstructured(model.head, "weight", 0.5)
    mask = model.head.weight_mask.clone()
    lq.prepare(model, plan_of(config))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(*batches()[0]).square().mean().backward()
    optimizer.step()
    shipped = lq.convert(model.eval(), verify=batches())
    weight, kept = shipped.head.weight, mask.bool()
    assert kept.sum() == 320
    if name == "dynamic_tree":  # on a CPU bitsandbytes looks zero up beside it: one of 65,536 steps from -1 to 1
        assert weight[~kept].abs().max() <= 2**-15 * shipped.head.scale.max()
    else:
        assert (weight[~kept] == 0).all()
    assert (weight[kept] != 0).float().mean() > 0.7
    lq.save_quantized(shipped, tmp_path / "model")
    loaded = lq.load_quantized(tmp_path / "model", Tagged())
    assert torch.equal(output(loaded, batches()[0]), output(shipped, batches()[0]))


class Tied(nn.Module):
    """A language model's embedding and head with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(40, 64), nn.Linear(64, 40, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, token: Tensor) -> Tensor:
        return self.head(self.tokens(token))


@pytest.mark.parametrize("scheme", ["nf4", "fp4", "dynamic_tree", "llm_int8"])
def test_tied_weights(scheme: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, token = Tied(), torch.arange(40)
    weight = QuantizationConfig(scheme, group_size=None if scheme == "llm_int8" else 64)
    lq.prepare(model, QuantizationPlan([LayerRule("*", weight)]))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    F.cross_entropy(model(token), token).backward()
    optimizer.step()
    assert model.head.weight is model.tokens.weight
    with torch.no_grad():
        shipped = lq.convert(model.eval(), verify=[(token,)])
        assert torch.equal(shipped.head.codes, shipped.tokens.codes)
        lq.save_quantized(shipped, tmp_path / "model")
        loaded = lq.load_quantized(tmp_path / "model", Tied())
        assert torch.equal(loaded(token), shipped(token))


@pytest.mark.parametrize("threshold", [0.9, 0.99])
@torch.no_grad()
def test_a_quantile_of_the_columns_of_an_input_are_outliers(threshold: float) -> None:
    x, bnb = randn(64, 1000), BitsAndBytesConfig(outlier_threshold=threshold)
    model = lq.prepare(nn.Sequential(nn.Linear(1000, 8)), QATConfig("llm_int8", bnb=bnb)).eval()
    held = lq.quantize_int8(x, bnb)
    assert held.outliers is not None
    assert held.outliers.columns.numel() == round(1000 * (1 - threshold))  # the witness
    kept = (model[0].input_quantizer(x) == x).all(0).nonzero().flatten()
    assert torch.equal(kept, held.outliers.columns)
    assert lq.sqnr(model(x), lq.convert(model)(x)) > 60


@pytest.mark.parametrize("name", ["nf4", "llm_int8", "int8_weight_only"])
def test_batchnorm_is_folded_into_integers_only(name: str, trained: dict[str, Tagged]) -> None:
    shipped = lq.convert(trained[name])
    assert isinstance(shipped.norm, FoldedBatchNorm) == (name == "int8_weight_only")


@pytest.mark.parametrize("name", ["nf4 nested", "llm_int8"])
def test_an_interrupted_run_ends_as_the_whole_one(name: str) -> None:
    config = replace(CONFIGS[name], start_step=1, freeze_step=8)
    assert_resume_exact(
        Tagged,
        lambda: (StatefulDataLoader(data(), batch_size=4, shuffle=True), DataLoader(data(8), 4)),
        lambda: [lq.QuantizationAwareTraining(plan_of(config))],
        interrupt_at=[4, 9],
        witness=name == "nf4 nested",
    )


def test_magnitudes_beyond_a_scheme_are_told() -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    model[0].weight.data[1, 2] = 7e4
    with pytest.raises(ValueError, match="magnitudes beyond llm_int8"):
        lq.convert(lq.prepare(model, "llm_int8").eval())


@pytest.mark.parametrize("field", ["nested", "bits", "scheme"])
def test_an_edited_manifest_is_refused(tmp_path: Path, field: str) -> None:
    config = lq.QATConfig("nf4", activation_bits=None, bnb=lq.BitsAndBytesConfig(bits=4, nested_quantization=True))
    model = lq.convert(lq.prepare(nn.Sequential(nn.Linear(64, 4)), config).eval())
    file = lq.save_quantized(model, tmp_path / "model") / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["layers"]["0"]["weight"][field] = {"nested": False, "bits": 8, "scheme": "int8"}[field]
    file.write_text(json.dumps(manifest))
    with pytest.raises(lq.QuantizedFileError, match="is altered"):
        lq.load_quantized(tmp_path / "model", nn.Sequential(nn.Linear(64, 4)))
