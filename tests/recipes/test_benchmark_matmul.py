"""Group ``matmul`` verifies every product at every batch size before it times. No time is looked at."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from lightning_qat.recipes import _benchmark_matmul, _benchmark_products
from lightning_qat.recipes._benchmark_matmul import matmul_group
from lightning_qat.recipes._benchmark_peers import MATMUL_PEERS, Peer
from lightning_qat.recipes._benchmark_products import Product
from lightning_qat.recipes._timing import Conditions, Gauge

SIDE = 128
TINY = Conditions(1, size=SIDE, gauge=Gauge(torch.device("cpu"), elements=64, side=8))
NAMES = [
    "float, float32",
    "lightning_qat int8_dynamic",
    "lightning_qat llm_int8",
    "lightning_qat w4a16",
    "lightning_qat nf4",
]


def test_ours_and_the_installed_peers_at_every_batch_size():
    results = matmul_group(TINY, batches=(1, 3))
    names = [*NAMES, *(peer.name for peer in MATMUL_PEERS if peer.installed)]
    for batch in (1, 3):
        timings = [timing for timing in results.timings if timing.group == f"matmul Linear 128, batch {batch}"]
        assert [timing.name for timing in timings] == names
        assert {timing.operations for timing in timings} == {2 * SIDE * SIDE * batch}
        assert all(timing.of_copy > 0 and timing.of_matrix > 0 for timing in timings)
        found = {timing.name: timing for timing in timings}
        assert found["float, float32"].sqnr_db > 120
        assert found["float, float32"].moved == 4 * SIDE * SIDE + 2 * 4 * SIDE * batch
        assert 30 < found["lightning_qat int8_dynamic"].sqnr_db < 50
        # Scales of float32 for groups of 128, and the input and output around.
        assert found["lightning_qat w4a16"].moved == SIDE * SIDE * 4.25 / 8 + 2 * 4 * SIDE * batch
    assert len(results.timings) == 2 * len(names)
    (note,) = results.notes
    assert note.startswith("torch.compile of one float Linear is not timed on the CPU")


def test_a_product_that_is_not_that_of_its_codes_is_not_timed(monkeypatch):
    right = _benchmark_products.our_products

    def wrong(layer, samples):
        found = right(layer, samples)
        product = found["lightning_qat w4a16"]
        return {"w4a16": Product(lambda x: product.run(x) * 1.001, product.weight_bytes, product.exact)}

    monkeypatch.setattr(_benchmark_matmul, "our_products", wrong)
    with pytest.raises(RuntimeError, match=r"w4a16 at batch 3 is 60\.\d dB from the product of its codes"):
        matmul_group(TINY, batches=(3,))


def test_a_wrong_code_of_a_converted_layer_is_not_timed(monkeypatch):
    right = _benchmark_products.convert

    def wrong(model):
        converted = right(model)
        converted[0].weight_packed.view(-1)[7] ^= 1
        return converted

    monkeypatch.setattr(_benchmark_products, "convert", wrong)
    with pytest.raises(RuntimeError, match=r"1 of 16384 codes of the converted int8_dynamic layer are wrong"):
        matmul_group(TINY, batches=(1,))


def test_a_layer_far_from_float_is_not_timed(monkeypatch):
    zeros = {"zeros": Product(lambda x: torch.zeros_like(x), 0)}
    monkeypatch.setattr(_benchmark_matmul, "our_products", lambda layer, samples: zeros)
    with pytest.raises(RuntimeError, match=r"zeros at batch 2 is -?0\.0 dB from the float layer"):
        matmul_group(TINY, batches=(2,))


def test_a_peer_that_fails_or_computes_something_else_is_a_note(monkeypatch):
    def broken(model, samples):
        raise RuntimeError("no such operator\nand a page more")

    def wrong(model, samples):
        model[0].weight.data.zero_()  # its copy, not the layer
        return lambda x: model(x).detach()

    peers = (Peer("broken", broken), Peer("wrong", wrong), Peer("absent", broken, ("no_such_package_is_installed",)))
    monkeypatch.setattr(_benchmark_matmul, "MATMUL_PEERS", peers)
    results = matmul_group(TINY, batches=(2,))
    assert [timing.name for timing in results.timings] == NAMES
    first, _, second = results.notes
    assert first == "broken is not timed: RuntimeError: no such operator"
    assert second.startswith("wrong is not timed in matmul Linear 128, batch 2: RuntimeError: wrong at batch 2 is ")


_KERNELS = """
import json, torch
from torch import nn
from lightning_qat.metrics import sqnr
from lightning_qat.recipes._benchmark_products import exact_product, kernel_products
torch.manual_seed(0)
layer = nn.Linear(128, 64).half()  # the interpreter multiplies the bits of bfloat16 tiles as integers
found = {}
for name, product in kernel_products(layer).items():
    x = torch.randn(1, 128).half()
    result = product.run(x)
    found[name] = [
        float(sqnr(product.exact(x), result)),
        float(sqnr(exact_product(x, layer.weight, layer.bias), result)),
        product.weight_bytes,
    ]
print(json.dumps(found))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernels_are_called_rightly_in_the_interpreter(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", _KERNELS]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found) == ["w8a8 kernel, per token", "w4a16 kernel", "nf4 kernel"]
    assert all(exact > 40 and 15 < plain < exact for exact, plain, _ in found.values())
    assert found["nf4 kernel"][2] == 128 * 64 * 4.5 / 8


def test_the_layer_itself_stays_as_it_is():
    layer = nn.Linear(SIDE, SIDE)
    before = layer.weight.clone()
    _benchmark_products.our_products(layer, torch.randn(4, SIDE))
    assert torch.equal(layer.weight, before)
