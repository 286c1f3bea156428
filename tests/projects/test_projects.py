"""Projects as people write them, which know nothing of quantization: one line in the Trainer adds it."""

import ast
import hashlib
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

import lightning_qat as lq
from lightning_qat.nn import QuantizedLayer

pytest.importorskip("sklearn", reason="the digits of two projects come with scikit-learn")

#: Each with what its float run reaches at least: twice and more of guessing, or half the error of the mean image.
PROJECTS = {"image_classifier": 0.7, "text_classifier": 0.5, "autoencoder_gan": 0.06}
HERE = Path(__file__).parent


def quiet(folder):
    return dict(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=str(folder),
    )  # fmt: skip


def digest(trainer, model):
    """Every bit of the weights and every metric of a run."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode() + tensor.contiguous().numpy().tobytes())
    metrics = {name: float(value).hex() for name, value in sorted(trainer.callback_metrics.items())}
    return [found.hexdigest(), metrics]


ALONE = """
import importlib, json, sys
import torch
from test_projects_digest import digest, quiet
torch.set_num_threads(1)
found = {name: digest(*importlib.import_module(name).train(**quiet(sys.argv[1]))) for name in sys.argv[2:]}
assert "lightning_qat" not in sys.modules
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def without_us(tmp_path_factory):
    """The float runs in a process that never imports lightning_qat."""
    folder = tmp_path_factory.mktemp("alone")
    source = ast.parse(Path(__file__).read_text(encoding="utf-8"))
    parts = [node for node in source.body if isinstance(node, ast.FunctionDef) and node.name in ("digest", "quiet")]
    (folder / "test_projects_digest.py").write_text(
        "import hashlib\n\n" + "\n\n".join(map(ast.unparse, parts)), encoding="utf-8"
    )
    paths = os.pathsep.join([str(folder), str(HERE)])
    command = [sys.executable, "-W", "ignore", "-c", ALONE, str(folder), *PROJECTS]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}, check=False, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def evaluation(name, project):
    """The project's own test data and the metric that counts."""
    if name == "autoencoder_gan":
        return DataLoader(project.digits(), 100), "error"
    data = project.Digits() if name == "image_classifier" else project.Passages()
    data.setup("test")
    return data.test_dataloader(), "accuracy"


@pytest.mark.parametrize("name", PROJECTS)
def test_one_line_quantizes_a_project(name, tmp_path, without_us):
    project = importlib.import_module(f"projects.{name}")
    options = quiet(tmp_path)
    # Runs of 50 to 70 steps: ranges have to follow faster than with the default of 0.99, which is for thousands.
    config = lq.QATConfig("int8", per_channel=True, observer_momentum=0.9)
    qat = lq.QuantizationAwareTraining(config, start_step=0.25, freeze_step=0.75)

    trainer, model = project.train(qat, **options)
    quantized = lq.convert(model)

    assert isinstance(quantized, type(model))
    assert sum(isinstance(layer, QuantizedLayer) for layer in quantized.modules()) >= 4
    assert qat.certificate.passed
    loader, metric = evaluation(name, project)
    ours, theirs = (torch.cat(trainer.predict(each, loader)) for each in (quantized, model))
    assert lq.sqnr(theirs, ours) > 60
    results = [trainer.test(each, loader, verbose=False)[0] for each in (quantized, model)]
    if metric == "accuracy":
        assert torch.equal(ours.argmax(1), theirs.argmax(1))
        assert results[0]["test/accuracy"] == results[1]["test/accuracy"]

    # Without the line the project is what it was, to the last bit.
    plain_trainer, plain = project.train(**options)
    assert digest(plain_trainer, plain) == without_us[name]
    assert not any(type(layer).__module__.startswith("lightning_qat") for layer in plain.modules())
    in_float = plain_trainer.test(plain, loader, verbose=False)[0][f"test/{metric}"]
    reached = results[0][f"test/{metric}"]
    if metric == "accuracy":
        assert in_float > PROJECTS[name]
        assert reached > in_float - 0.05
    else:
        assert in_float < PROJECTS[name]
        assert reached < 1.1 * in_float


def test_the_projects_do_not_mention_quantization():
    for name in PROJECTS:
        text = (HERE / f"{name}.py").read_text(encoding="utf-8").lower()
        assert not any(word in text for word in ("quant", "qat", "int8"))
