"""Low-rank adapters (peft) on packed weights: they train as on bitsandbytes', in a Trainer, and find their way out."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from llamas import IDS, llama
from torch import Tensor, nn

import lightning_qat as lq
from lightning_qat.testing import assert_resume_exact

pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

TARGETS = ["q_proj", "v_proj", "down_proj"]
HEAD = lq.LayerRule("*lm_head")
NESTED = lq.BitsAndBytesConfig(bits=4, block_size=64, nested_quantization=True)
FORMATS: dict[str, Any] = {
    "nf4": "nf4",
    "nf4, nested": lq.QuantizationConfig("nf4", bnb=NESTED),
    "int4, groups": lq.QuantizationConfig("int4", group_size=32),
    "gptq": lq.QuantizationConfig("gptq", group_size=32),
    "int8, per token": "int8_dynamic",
    "llm_int8": "llm_int8",
}


def quantized(config: Any = "nf4") -> Any:
    batches = [{"input_ids": IDS}]
    return lq.quantize_model(llama(), lq.QuantizationPlan([HEAD], base=config), batches)


def with_adapters(model: nn.Module, **options: Any) -> Any:
    """Return peft's model, whose adapters change something from the start."""
    torch.manual_seed(7)
    options = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "init_lora_weights": False} | options
    return peft.get_peft_model(model, peft.LoraConfig(**options))


def adapters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def train(model: Any, steps: int = 6) -> tuple[list[float], dict[str, Tensor]]:
    """Return the losses, and the adapters in the end."""
    model.train()
    optimizer = torch.optim.AdamW(adapters(model).values(), lr=5e-3)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: p.detach().clone() for name, p in adapters(model).items()}


def theirs() -> Any:
    """Return the same model with bitsandbytes' own layers, which quantize by themselves."""
    bnb = pytest.importorskip("bitsandbytes")
    model = llama()
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and name != "lm_head":
            layer = bnb.nn.Linear4bit(
                linear.in_features, linear.out_features, bias=False, quant_type="nf4", compress_statistics=False
            )
            layer.weight = bnb.nn.Params4bit(
                linear.weight.detach().clone(), requires_grad=False, quant_type="nf4", compress_statistics=False
            )
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.to("cpu"))
    return model


def test_they_train_as_on_the_layers_of_bitsandbytes():
    import bitsandbytes as bnb

    ours, other = quantized(), theirs()
    for name, layer in ours.named_modules():  # the witness: the same values, in its own dequantization too
        if isinstance(layer, lq.QuantizedLinear):
            weight = other.get_submodule(name).weight
            assert torch.equal(weight.data.reshape(-1), layer.weight_packed), name
            assert torch.equal(bnb.functional.dequantize_4bit(weight.data, weight.quant_state), layer.weight), name
    losses, found = train(with_adapters(ours))
    expected_losses, expected = train(with_adapters(other))
    assert losses[-1] < losses[0] - 0.1
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-5)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)


def kept_of(model: nn.Module, shapes: set[tuple[int, ...]]) -> set[tuple[int, ...]]:
    """Return which of ``shapes`` autograd is given to keep, also as their transposes."""
    seen = set()

    def pack(t: Tensor) -> Tensor:
        seen.update((tuple(t.shape), tuple(t.shape)[::-1]))
        return t

    ids = IDS[:, :13]  # 26 tokens: no weight has as many rows
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(input_ids=ids, labels=ids)
    return seen & shapes


@pytest.mark.parametrize("title", FORMATS)
def test_only_adapters_train_and_no_float_weight_is_kept(title):
    model = quantized(FORMATS[title])
    codes = {name: b.clone() for name, b in model.named_buffers()}
    model = with_adapters(model)
    assert all("lora_" in name for name in adapters(model))
    shapes = {tuple(m.weight_shape) for m in model.modules() if isinstance(m, lq.QuantizedLinear)}
    assert kept_of(with_adapters(llama()), shapes) == shapes  # a float base keeps its own
    assert not kept_of(model, shapes)
    losses, _ = train(model)
    assert losses[-1] < losses[0]
    for name, value in model.base_model.model.named_buffers():
        plain = name.replace(".base_layer", "")
        assert plain not in codes or torch.equal(value, codes[plain]), name


def test_gradients_with_activation_checkpointing_are_the_same():
    wanted = with_adapters(quantized())
    wanted(input_ids=IDS, labels=IDS).loss.backward()
    for reentrant in (False, True):
        model = with_adapters(quantized())
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.train()
        model(input_ids=IDS, labels=IDS).loss.backward()
        for name, p in adapters(wanted).items():
            assert torch.equal(adapters(model)[name].grad, p.grad), name


def test_merging_into_codes_is_refused_and_into_the_float_model_works():
    model = with_adapters(quantized())
    train(model)
    model.eval()
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        for merge in (model.merge_adapter, lambda: model.merge_adapter(safe_merge=True)):
            with pytest.raises(RuntimeError, match="is computed from its codes .* merge adapters into the float model"):
                merge()
        for layer in model.modules():  # what peft noted before it wrote
            if hasattr(layer, "merged_adapters"):
                assert not layer.merged_adapters
        merged = lq.dequantize_model(model).merge_and_unload()
        assert not any("lora" in name for name, _ in merged.named_modules())
        torch.testing.assert_close(merged(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(model(input_ids=IDS).logits, expected)
    again = lq.quantize_model(merged, lq.QuantizationPlan([HEAD], base="nf4"))
    assert isinstance(again.model.layers[0].self_attn.q_proj, lq.QuantizedLinear)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_that_changes_the_base_is_refused(start):
    with pytest.raises(RuntimeError, match="is computed from its codes"):
        with_adapters(quantized(), init_lora_weights=start)


def test_dora_reads_the_base():
    losses, _ = train(with_adapters(quantized(), use_dora=True))
    assert losses[-1] < losses[0]


def test_adapters_are_saved_without_the_base_and_loaded_onto_it(tmp_path):
    model = with_adapters(quantized())
    train(model)
    model.save_pretrained(tmp_path / "adapters")
    lq.save_quantized(quantized(), tmp_path / "base")
    base = lq.load_quantized(tmp_path / "base", llama(seed=3))
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapters")
    with torch.no_grad():
        assert torch.equal(loaded.eval()(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)
    lq.save_quantized(model, tmp_path / "both")  # or both in one folder
    whole = lq.load_quantized(tmp_path / "both", with_adapters(llama(seed=3)))
    with torch.no_grad():
        assert torch.equal(whole.eval()(input_ids=IDS).logits, model(input_ids=IDS).logits)


class Tuned(L.LightningModule):
    """Adapters on a converted base, as a LightningModule has them."""

    def __init__(self) -> None:
        super().__init__()
        base = quantized()
        self.net = with_adapters(base, lora_dropout=0.1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.net(input_ids=batch, labels=batch).loss
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(adapters(self).values(), lr=5e-3)


def batches() -> Any:
    ids = torch.randint(0, 96, (12, 8), generator=torch.Generator().manual_seed(3))
    return torch.utils.data.DataLoader(ids, batch_size=3)


def test_a_run_that_is_interrupted_ends_as_one_that_was_not(tmp_path):
    assert_resume_exact(Tuned, batches, list, interrupt_at=[4], max_epochs=2, folder=tmp_path)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_16_bit_precision(precision, tmp_path):
    module = Tuned()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer = L.Trainer(
        max_epochs=2, precision=precision, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, batches())
    for name, value in module.state_dict().items():
        moved = not torch.equal(value, before[name].to(value.dtype))
        assert moved == ("lora_" in name), name


def test_preparing_a_converted_base_says_what_to_do():
    with pytest.raises(ValueError, match=r"layer '.*q_proj.base_layer' of .* is already converted; prepare a float"):
        lq.prepare(with_adapters(quantized()), "int8")
