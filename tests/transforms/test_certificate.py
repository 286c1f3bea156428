"""``certificate.json``: saved with a verified model, and worth nothing once a byte of it or of the tensors differs."""

import copy
import hashlib
import json

import pytest
import torch
from torch import nn

import lightning_qat as lq

FILES = ["certificate.json", "manifest.json", "model.safetensors"]


def build():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))


@pytest.fixture
def verified():
    torch.manual_seed(0)
    model, x = lq.prepare(build(), "int8"), torch.randn(8, 1, 4, 4)
    model(x)
    lq.calibrate(model, [x])
    return lq.convert(model, verify=[x])


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_round_trip(verified, tmp_path):
    path = lq.save_quantized(verified, tmp_path / "model")
    assert sorted(file.name for file in path.iterdir()) == FILES
    content = json.loads((path / "certificate.json").read_text())
    assert content["sha256"] == sha256(path / "model.safetensors")
    assert content["passed"] is True
    assert content["report"]["torch"] == torch.__version__
    assert [layer["name"] for layer in content["report"]["layers"]] == ["0", "3"]
    assert json.loads((path / "manifest.json").read_text())["certificate"] == sha256(path / "certificate.json")
    report = lq.parity_report(verified)
    assert lq.read_certificate(path) == report
    loaded = lq.load_quantized(path, build())
    assert lq.parity_report(loaded) == report
    again = lq.save_quantized(loaded, tmp_path / "again")  # still the tensors that were verified
    assert lq.read_certificate(again) == report
    assert lq.read_certificate(lq.save_quantized(copy.deepcopy(verified), tmp_path / "copy")) == report


def test_models_without_a_certificate_load(verified, tmp_path):
    del verified.__dict__["_parity_report"]
    path = lq.save_quantized(verified, tmp_path / "model")
    assert sorted(file.name for file in path.iterdir()) == FILES[1:]
    assert lq.read_certificate(path) is None
    assert lq.parity_report(lq.load_quantized(path, build())) is None


def test_a_model_changed_after_it_was_verified_is_saved_without(verified, tmp_path, caplog):
    verified[3].bias.data += 1
    path = lq.save_quantized(verified, tmp_path / "model")
    assert "changed after it was verified" in caplog.text
    assert lq.read_certificate(path) is None
    lq.load_quantized(path, build())


def rewrite(path, edit):
    """Edit the certificate as one who also knows the manifest would."""
    content = json.loads((path / "certificate.json").read_text())
    edit(content)
    (path / "certificate.json").write_text(json.dumps(content))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["certificate"] = sha256(path / "certificate.json")
    del manifest["manifest_sha256"]
    (path / "manifest.json").write_text(json.dumps(manifest))


def damage(path, how):
    file, manifest = path / "certificate.json", path / "manifest.json"
    if how == "altered":
        file.write_text(file.read_text().replace('"changed": 0', '"changed": 1'))
    elif how == "missing":
        file.unlink()
    elif how == "unlisted":
        content = json.loads(manifest.read_text())
        del content["certificate"], content["manifest_sha256"]
        manifest.write_text(json.dumps(content))
    elif how == "other tensors":
        rewrite(path, lambda content: content.update(sha256="0" * 64))
    elif how == "other version":
        rewrite(path, lambda content: content.update(version=99))
    elif how == "no report":
        rewrite(path, lambda content: content.pop("report"))
    elif how == "unknown field":
        rewrite(path, lambda content: content["report"].update(colour="blue"))
    elif how == "no dict":
        rewrite(path, lambda content: content.update(report=[1]))
    elif how == "tensors":
        data = (path / "model.safetensors").read_bytes()
        (path / "model.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("altered", "certificate.json is truncated or altered"),
        ("missing", "holds no certificate.json, which manifest.json lists"),
        ("unlisted", "was not saved with this model"),
        ("other tensors", "certifies other tensors than those in the folder"),
        ("other version", "has version 99"),
        ("no report", "is damaged"),
        ("unknown field", "is damaged"),
        ("no dict", "is damaged"),
        ("tensors", "model.safetensors is truncated or altered"),
    ],
)
def test_a_certificate_that_proves_nothing_is_told(how, message, verified, tmp_path):
    path = lq.save_quantized(verified, tmp_path / "model")
    damage(path, how)
    with pytest.raises(lq.QuantizedFileError, match=message):
        lq.read_certificate(path)
    model = build()
    with pytest.raises(lq.QuantizedFileError, match=message):
        lq.load_quantized(path, model)
    assert type(model[0]) is nn.Conv2d
