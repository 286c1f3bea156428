"""Saved models: load to the same numbers, and clear errors for anything that is not one."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import lightning_qat as lq
from lightning_qat.transforms.checkpoint import MANIFEST, TENSORS


def build():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * 36, 16), nn.Linear(16, 4)
    )  # fmt: skip


def converted(plan="int8"):
    torch.manual_seed(0)
    model = lq.prepare(build(), plan)
    for _ in range(2):
        model(torch.randn(3, 1, 8, 8))
    lq.calibrate(model, [torch.randn(3, 1, 8, 8)])
    return lq.convert(model)


PLAN = lq.QuantizationPlan([lq.LayerRule("4", "w4a8"), lq.LayerRule("5")], base="int8")


@pytest.mark.parametrize("plan", ["int8", "w4a8", "int8_dynamic", "int8_weight_only", PLAN])
def test_round_trip(plan, tmp_path):
    model = converted(plan)
    path = lq.save_quantized(model, tmp_path / "deep" / "model")
    assert sorted(p.name for p in path.iterdir()) == [MANIFEST, TENSORS]
    assert [p.name for p in path.parent.iterdir()] == ["model"]
    twin = lq.load_quantized(path, build())
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(twin(x), model(x))
    assert twin.state_dict().keys() == model.state_dict().keys()


def test_a_fresh_process_computes_the_same(tmp_path):
    model = converted()
    lq.save_quantized(model, tmp_path / "model")
    x = torch.randn(4, 1, 8, 8)
    save_file({"x": x, "y": model(x)}, tmp_path / "io.safetensors")
    code = f"""
        import torch, lightning_qat as lq
        from torch import nn
        from safetensors.torch import load_file
        model = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
                              nn.Linear(8 * 36, 16), nn.Linear(16, 4))
        io = load_file({str(tmp_path / "io.safetensors")!r})
        assert torch.equal(lq.load_quantized({str(tmp_path / "model")!r}, model)(io["x"]), io["y"])
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=120)


def test_saving_again_replaces_only_a_saved_model(tmp_path):
    model = converted()
    lq.save_quantized(model, tmp_path / "model")
    lq.save_quantized(model, tmp_path / "model")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not a saved quantized model"):
        lq.save_quantized(model, tmp_path / "other")
    assert (tmp_path / "other" / "thesis.txt").read_text() == "mine"


def test_a_failure_leaves_nothing_half_written(tmp_path, monkeypatch):
    model = converted()
    lq.save_quantized(model, tmp_path / "model")
    before = (tmp_path / "model" / MANIFEST).read_text()

    def full_disk(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr("lightning_qat.transforms.checkpoint.save_file", full_disk)
    for name in ("model", "new"):
        with pytest.raises(OSError, match="no space"):
            lq.save_quantized(model, tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / MANIFEST).read_text() == before


def test_only_converted_models_are_saved(tmp_path):
    with pytest.raises(ValueError, match="not converted"):
        lq.save_quantized(lq.prepare(build(), "int8"), tmp_path / "model")
    with pytest.raises(ValueError, match="no quantized layer"):
        lq.save_quantized(build(), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def damage(path, how):
    tensors, manifest = path / TENSORS, path / MANIFEST
    data = tensors.read_bytes()
    if how == "truncated tensors":
        tensors.write_bytes(data[: len(data) // 2])
    elif how == "altered tensors":
        tensors.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    elif how == "no tensors":
        tensors.unlink()
    elif how == "no manifest":
        manifest.unlink()
    elif how == "truncated manifest":
        manifest.write_text(manifest.read_text()[:100])
    elif how == "binary manifest":
        manifest.write_bytes(b"\xff\xfe\x00")
    elif how == "foreign manifest":
        manifest.write_text('{"model_type": "llama"}')
    elif how == "list manifest":
        manifest.write_text("[1]")
    elif how == "newer version":
        manifest.write_text(manifest.read_text().replace('"version": 1', '"version": 99'))
    elif how == "lacks a key":
        body = json.loads(manifest.read_text())
        del body["layers"]
        manifest.write_text(json.dumps(body))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated tensors", "truncated or altered"),
        ("altered tensors", "truncated or altered"),
        ("no tensors", "holds no model.safetensors"),
        ("no manifest", "not a saved quantized model"),
        ("truncated manifest", "is damaged"),
        ("binary manifest", "is damaged"),
        ("foreign manifest", "was not written by lightning_qat"),
        ("list manifest", "was not written by lightning_qat"),
        ("newer version", "version 99; this library reads 1"),
        ("lacks a key", "it lacks layers"),
    ],
)
def test_damaged_files_are_told_and_the_model_stays(how, message, tmp_path):
    path = lq.save_quantized(converted(), tmp_path / "model")
    damage(path, how)
    model = build()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(lq.QuantizedFileError, match=message):
        lq.load_quantized(path, model)
    assert type(model[0]) is nn.Conv2d
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_another_model_is_told(tmp_path):
    path = lq.save_quantized(converted(PLAN), tmp_path / "model")
    wrong_shape, wrong_type, lacks, more = build(), build(), build(), build()
    wrong_shape[4] = nn.Linear(8 * 36, 17)
    wrong_type[4] = nn.Identity()
    del lacks[5]
    more.append(nn.Linear(4, 4))
    float_shape = build()
    float_shape[5] = nn.Linear(16, 5)
    cases = [
        (wrong_shape, r"layer '4' is a Linear of shape \[17, 288\] in the model and a Linear of shape \[16, 288\]"),
        (wrong_type, "layer '4' is a Identity"),
        (lacks, "the model has no '5.bias'"),
        (more, "has no '6.bias'"),
        (float_shape, r"'5.(bias|weight)' has shape"),
        (lq.prepare(build(), "int8"), "already prepared or converted"),
    ]
    for model, message in cases:
        with pytest.raises(lq.QuantizedFileError, match=message):
            lq.load_quantized(path, model)
        assert not any(isinstance(m, lq.nn.QuantizedLayer) for m in model.modules())


def test_tied_layers_are_stored_once(tmp_path):
    shared = nn.Linear(64, 64)
    model = lq.convert(lq.prepare(nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)}), "int8_weight_only"))
    path = lq.save_quantized(model, tmp_path / "model")
    assert sum(t.numel() for t in load_file(path / TENSORS).values() if t.dtype is torch.int8) == 64 * 64
    again = nn.Linear(64, 64)
    twin = lq.load_quantized(path, nn.ModuleDict({"a": again, "b": nn.Sequential(again)}))
    x = torch.randn(2, 64)
    assert torch.equal(twin["b"](x), model["b"](x))


def test_float_tied_weights_round_trip(tmp_path):
    def tied():
        torch.manual_seed(1)
        model = nn.ModuleDict(
            {"table": nn.Embedding(10, 4), "out": nn.Linear(4, 10, bias=False), "mid": nn.Linear(4, 4)}
        )
        model["out"].weight = model["table"].weight
        return model

    model = lq.convert(lq.prepare(tied(), lq.QuantizationPlan([lq.LayerRule("mid", "int8")])))
    path = lq.save_quantized(model, tmp_path / "model")
    twin = lq.load_quantized(path, tied())
    assert twin["out"].weight is twin["table"].weight
    assert torch.equal(twin["out"].weight, model["out"].weight)


@pytest.mark.parametrize(
    "change",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
        weight_norm,
        spectral_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        lambda layer: prune.random_unstructured(prune.l1_unstructured(layer, "weight", 0.5), "bias", 0.5),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_a_fresh_model_whose_weights_are_computed_is_filled(change, tmp_path):
    def fresh():
        model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
        change(model[0])
        return model

    torch.manual_seed(0)
    model, x = lq.prepare(fresh(), "int8"), torch.randn(5, 6)
    lq.calibrate(model, [x])
    converted = lq.convert(model)
    lq.save_quantized(converted, tmp_path / "model")
    loaded = lq.load_quantized(tmp_path / "model", fresh())
    assert loaded.state_dict().keys() == converted.state_dict().keys()
    assert torch.equal(loaded(x), converted(x))
    other = nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 5)), nn.ReLU(), nn.Linear(5, 6))
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(lq.QuantizedFileError, match=r"layer '0' is a Linear of shape \[5, 6\]"):
        lq.load_quantized(tmp_path / "model", other)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_a_fresh_model_with_a_pruned_norm_is_filled(tmp_path):
    def fresh():
        model = build()
        prune.l1_unstructured(model[1], "weight", 0.25)
        return model

    torch.manual_seed(0)
    model, x = lq.prepare(fresh(), "int8"), torch.randn(3, 1, 8, 8)
    lq.calibrate(model, [x])
    converted = lq.convert(model)
    lq.save_quantized(converted, tmp_path / "model")
    loaded = lq.load_quantized(tmp_path / "model", fresh())
    assert torch.equal(loaded(x), converted(x))


def test_lazy_layers_are_named_with_the_way_out(tmp_path):
    lq.save_quantized(converted(), tmp_path / "model")
    model = build()
    model[4] = nn.LazyLinear(16)
    with pytest.raises(lq.QuantizedFileError, match="layer '4' is lazy.*run one batch"):
        lq.load_quantized(tmp_path / "model", model)
    model(torch.randn(2, 1, 8, 8))
    assert isinstance(lq.load_quantized(tmp_path / "model", model)[4], lq.QuantizedLinear)
