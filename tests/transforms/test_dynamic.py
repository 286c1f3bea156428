"""quantize_dynamic: torch's call, this library's integers; what it computes, what it touches, what it refuses."""

from __future__ import annotations

import copy
import warnings

import lightning as L
import pytest
import torch
from linear_models import linears, network, quantized
from torch import nn
from torch.ao import quantization as tq
from torch.nn.utils import parametrizations, prune

import lightning_qat as lq
from lightning_qat.nn import QATLayer, QuantizedLayer
from lightning_qat.transforms.dynamic import quantize_dynamic


def rounded(x: torch.Tensor, dims: int | None) -> torch.Tensor:
    """Return symmetric 8-bit quantization in float64, one range for each index of the dimensions before the last."""
    absmax = x.abs().amax(-1, keepdim=True) if dims is None else x.abs().max()
    scale = (absmax.float() / 127).double()
    return (x.double() / scale).round().clamp(-127, 127) * scale


# --- what it computes -----------------------------------------------------------------------------


def test_a_linear_computes_with_per_channel_weights_and_per_token_inputs() -> None:
    model, x = linears(32, 24), torch.randn(2, 5, 32)
    # The witness, first proved right: where nothing is lost it is the float product.
    exact = torch.randint(-127, 128, (3, 32)).float()
    exact[:, 0] = 127
    assert torch.equal(rounded(exact, None), exact.double())
    result = quantize_dynamic(model)
    wanted = rounded(x, None) @ rounded(model[0].weight.detach(), None).T + model[0].bias.double()
    torch.testing.assert_close(result(x).double(), wanted, rtol=1e-5, atol=1e-6)
    assert result[0].codes.dtype is torch.int8
    assert torch.equal(result[0].codes, (model[0].weight / (model[0].weight.abs().amax(1, True) / 127)).round().char())
    assert result[0].execution.endswith(" int8 per token")
    assert "weight" not in dict(result.named_parameters())


def test_it_equals_prepare_and_convert() -> None:
    model, x = linears(16, 32, 8), torch.randn(7, 16)
    by_hand = lq.convert(lq.prepare(copy.deepcopy(model), "int8_dynamic").eval())
    result = quantize_dynamic(model)
    assert torch.equal(result(x), by_hand(x))
    assert result.state_dict().keys() == by_hand.state_dict().keys()
    assert lq.quantization_statistics(result)["0"].execution == lq.quantization_statistics(by_hand)["0"].execution


def test_it_is_closer_to_float_than_torchs_own() -> None:
    model, x = linears(256, 256, 64), torch.randn(64, 256) * torch.logspace(-2, 1, 64)[:, None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        theirs = tq.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    expected, ours = model(x), quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert lq.sqnr(expected, ours(x)) > lq.sqnr(expected, theirs(x)) + 3
    # Tokens with a range of their own: the smallest ones too, of which torch's single range leaves little.
    assert lq.sqnr(expected[0], ours(x)[0]) > 30 > lq.sqnr(expected[0], theirs(x)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model, x = linears(32, 32, 8).to(dtype), torch.randn(4, 32, dtype=dtype)
    result = quantize_dynamic(model)
    assert result(x).dtype is dtype
    assert result[0].codes.dtype is torch.int8
    assert lq.sqnr(model(x), result(x)) > 30


def test_saving_and_loading(tmp_path) -> None:
    model, x = linears(16, 16, 4), torch.randn(3, 16)
    result = quantize_dynamic(model)
    lq.save_quantized(result, tmp_path)
    assert torch.equal(lq.load_quantized(tmp_path, linears(16, 16, 4))(x), result(x))


# --- what it touches ------------------------------------------------------------------------------


def test_the_given_model_stays_as_it_is() -> None:
    model = network().train()
    model.head.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    state = {
        name: (tensor, tensor.clone(), tensor.requires_grad)
        for name, tensor in model.state_dict(keep_vars=True).items()
    }
    result = quantize_dynamic(model)
    assert not any(module.training for module in result.modules())
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert not any(isinstance(module, (QATLayer, QuantizedLayer)) for module in model.modules())
    after = model.state_dict(keep_vars=True)
    assert after.keys() == state.keys()
    for name, (tensor, value, wants_grad) in state.items():
        assert after[name] is tensor
        assert torch.equal(tensor, value)
        assert tensor.requires_grad == wants_grad
    model(torch.randn(2, 4, 8)).sum().backward()
    assert model.head.weight.grad is not None
    kept = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert not kept & {tensor.data_ptr() for tensor in result.state_dict().values()}


@pytest.mark.parametrize("inplace", [False, True])
def test_no_float_weight_is_copied(inplace: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = []
    own = nn.Parameter.__deepcopy__

    def counting(self: nn.Parameter, memo: dict[int, object]) -> nn.Parameter:
        if id(self) not in memo:
            copied.append(tuple(self.shape))
        return own(self, memo)

    monkeypatch.setattr(nn.Parameter, "__deepcopy__", counting)
    quantize_dynamic(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 16)), inplace=inplace)
    assert sorted(copied) == [(16,), (32,)]  # the biases, once each


def test_in_place_the_layers_stay_the_objects_they_are() -> None:
    model, x = network(), torch.randn(2, 4, 8)
    wanted = quantize_dynamic(model)(x)
    layers, held, seen = dict(model.named_modules()), [model.head], []
    model.head.register_forward_hook(lambda module, args, output: seen.append(module))
    model.rnn.bias_ih_l0.marked = True
    parent = model.head.__dict__["parent"] = [model]
    result = quantize_dynamic(model.train(), inplace=True)
    assert result is model
    assert not model.training
    weights = {name: model.get_submodule(name) for name in ("rnn.ih_l0", "rnn.hh_l0")}  # made anew, as its layers
    assert dict(model.named_modules()) == layers | weights
    assert quantized(model) == ["body.0", "body.2", *weights, "head"]
    assert model.head.parent is parent
    assert model.rnn.bias_ih_l0.marked
    assert torch.equal(model(x), wanted)
    assert held[0] is seen[0] is model.head


def test_in_place_a_hook_of_the_parent_stays_bound_to_it() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.calls = nn.Linear(4, 4), 0
            self.layer.register_forward_hook(self.count)

        def count(self, *_: object) -> None:
            self.calls += 1

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)

    model = Counting()
    result = quantize_dynamic(model)
    quantize_dynamic(model, inplace=True)
    model(torch.randn(2, 4))
    assert (model.calls, result.calls) == (1, 0)
    result(torch.randn(2, 4))
    assert (model.calls, result.calls) == (1, 1)


@pytest.mark.parametrize("inplace", [False, True])
def test_pruned_normed_and_parametrized_layers(inplace: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 8),
        parametrizations.weight_norm(nn.Linear(8, 8)),
        torch.nn.utils.spectral_norm(nn.Linear(8, 8)),
        parametrizations.spectral_norm(nn.Linear(8, 4)),
    )
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    x = torch.randn(5, 8)
    model.eval()(x)
    expected, state = model(x), {k: v.clone() for k, v in model.train().state_dict().items()}
    result = quantize_dynamic(model, inplace=inplace)
    if not inplace:
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())
    assert quantized(result) == ["0", "1", "2", "3"]
    assert {key.split(".")[-1] for key in result.state_dict()} == {"weight_packed", "weight_scale", "bias"}
    assert lq.sqnr(expected, result(x)) > 25
    assert (result[0].codes == 0).float().mean() >= 0.5


@pytest.mark.parametrize("inplace", [False, True])
def test_a_single_linear_and_a_layer_of_two_parents(inplace: bool) -> None:
    alone = nn.Linear(8, 8)
    result = quantize_dynamic(alone, inplace=inplace)
    assert isinstance(result, lq.QuantizedLinear)
    assert (result is alone) == inplace
    shared = nn.Linear(8, 8)
    model = quantize_dynamic(nn.Sequential(nn.Sequential(shared), shared), inplace=inplace)
    assert model[0][0] is model[1]
    assert isinstance(model[1], lq.QuantizedLinear)


def test_tied_weights() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"table": nn.Embedding(10, 8), "head": nn.Linear(8, 10, bias=False)})
    model["head"].weight = model["table"].weight
    result = quantize_dynamic(model)
    assert quantized(result) == ["head"]
    assert torch.equal(result["table"].weight, model["table"].weight)
    assert result["table"].weight is not model["table"].weight
    again = quantize_dynamic(model, inplace=True)
    assert torch.equal(again["head"].codes, result["head"].codes)
    assert again["table"].weight.requires_grad


def test_batchnorm_stays_and_errors_change_nothing() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    assert type(quantize_dynamic(model)[1]) is nn.BatchNorm1d
    conv = nn.Sequential(nn.Conv1d(8, 8, 3), nn.BatchNorm1d(8))
    assert type(lq.convert(lq.prepare(copy.deepcopy(conv), "int8_dynamic"))[1]) is lq.nn.FoldedBatchNorm
    assert type(quantize_dynamic(conv, {nn.Conv1d})[1]) is nn.BatchNorm1d
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="weight of layer '2' holds NaN or inf"):
        quantize_dynamic(model.train(), inplace=True)
    assert model.training
    assert type(model[0]) is nn.Linear


def test_transformers_take_no_fast_path_around_it() -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
    x = torch.randn(2, 5, 16)
    with torch.no_grad():  # without gradients torch would take it
        expected = encoder.eval()(x)
        result = quantize_dynamic(encoder)
        assert quantized(result) == [f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
        out = result(x)
        assert 20 < lq.sqnr(expected, out) < 70
        quantize_dynamic(encoder, inplace=True)
        assert torch.equal(encoder(x), out)


def test_a_lightning_module_in_a_trainer() -> None:
    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.model = linears(8, 8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.model(x)

        def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
            return self(batch).square().mean()

        def test_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            self.log("loss", self(batch).square().mean())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    module, data = Module(), torch.utils.data.DataLoader(torch.randn(16, 8), batch_size=8)
    options = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = L.Trainer(max_steps=2, accelerator="cpu", **options)
    trainer.fit(module, data)
    result = quantize_dynamic(module)
    assert type(result) is Module
    assert quantized(result) == ["model.0", "model.2"]
    found = L.Trainer(accelerator="cpu", **options).test(result, data, verbose=False)
    assert found[0]["loss"] > 0
