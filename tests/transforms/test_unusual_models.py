"""Models as people have them: hooks, own norms, tied names, other dtypes, compiled, failing half way."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_qat as lq


class NormWithActivation(nn.BatchNorm2d):
    def forward(self, x):
        return F.silu(super().forward(x))


class ReadsItsNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv(x)) + self.bn.weight.sum()


def trained(model, plan="int8", shape=(3, 4, 8, 8)):
    torch.manual_seed(0)
    lq.prepare(model, plan)
    for _ in range(3):
        model(torch.randn(shape))
    lq.calibrate(model, [torch.randn(shape)])
    return model.eval()


@pytest.mark.parametrize("plan", ["int8", "int8_weight_only", lq.QATConfig("int8"), lq.QATConfig("int4")])
@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(nn.Conv2d(4, 4, 3), NormWithActivation(4)),
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 5, 3), nn.BatchNorm2d(5)),
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 4, 3), nn.BatchNorm2d(4)),
    ],
)
def test_the_shipped_model_is_the_trained_one(build, plan):
    model = trained(build(), plan)
    x = torch.randn(3, 4, 8, 8)
    torch.testing.assert_close(lq.convert(model)(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("calibrated", [True, False])
def test_hooks_that_change_an_output_are_not_folded_over(calibrated):
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    if calibrated:
        trained(model, "int8_weight_only")
    lq.prepare(model, "int8_weight_only")
    x = torch.randn(3, 4, 8, 8)
    torch.testing.assert_close(lq.convert(model.eval())(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_folded_norm_that_is_read_says_how_to_keep_it():
    model = trained(ReadsItsNorm())
    with pytest.raises(AttributeError, match="folded into the layer before it and has no 'weight'"):
        lq.convert(model)(torch.randn(3, 4, 8, 8))
    kept = trained(ReadsItsNorm(), "int8_weight_only")
    kept.conv.weight_quantizer.folded_norm = ""
    lq.convert(kept)(torch.randn(3, 4, 8, 8))


def test_padded_transformer_encoders_evaluate():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    x = torch.randn(2, 5, 16)
    lq.prepare(model, "int8")
    lq.calibrate(model, [{"src": x, "src_key_padding_mask": mask}])
    model.eval()
    with torch.no_grad():
        trained_output = model(x, src_key_padding_mask=mask)
        shipped = lq.convert(model)(x, src_key_padding_mask=mask)
    assert lq.sqnr(trained_output, shipped) > 60


@pytest.mark.parametrize("norm", [torch.nn.utils.weight_norm, torch.nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_old_style_normed_weights_convert(norm):
    torch.manual_seed(0)
    model = lq.prepare(nn.Sequential(norm(nn.Linear(6, 4))), "int8_weight_only")
    x = torch.randn(3, 6)
    model(x).sum().backward()
    model.eval()
    torch.testing.assert_close(lq.convert(model)(x), model(x))
    assert model[0].weight is not None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("plan", ["int8", "w4a8", lq.QATConfig("int8", symmetric=False)])
def test_other_dtypes_train_convert_save_and_load(dtype, plan, tmp_path):
    def build():
        return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))

    torch.manual_seed(0)
    model = lq.prepare(build().to(dtype), plan)
    x = torch.randn(4, 6, dtype=dtype)
    model(x).sum().backward()
    assert model[0].weight.grad.dtype is dtype
    converted = lq.convert(model.eval())
    lq.save_quantized(converted, tmp_path / "model")
    loaded = lq.load_quantized(tmp_path / "model", build())
    assert torch.equal(loaded(x), converted(x))
    assert loaded(x).dtype is dtype


def test_layers_that_another_library_quantized_are_left_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(model[1].weight.to(torch.float8_e4m3fn), requires_grad=False)
    lq.prepare(model, "int8_weight_only")
    assert type(model[1]) is nn.Linear


def test_a_failure_half_way_leaves_the_model_in_float(monkeypatch):
    from lightning_qat.quantizers.weight_quantizer import WeightQuantizer

    model, calls = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), []
    derive = WeightQuantizer._derive

    def second_fails(self, weight):
        calls.append(weight)
        if len(calls) == 2:
            raise MemoryError
        return derive(self, weight)

    monkeypatch.setattr(WeightQuantizer, "_derive", second_fails)
    with pytest.raises(MemoryError):
        lq.prepare(model, "int8")
    assert [type(m) for m in model] == [nn.Linear, nn.Linear]
    lq.prepare(model, "int8")


def test_a_failed_calibration_keeps_the_ranges():
    model = lq.prepare(nn.Sequential(nn.Linear(3, 3)), "int8")
    lq.calibrate(model, [torch.ones(1, 3)])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="NaN"):
        lq.calibrate(model, [torch.full((1, 3), 9.0), torch.full((1, 3), float("nan"))])
    after = model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before if isinstance(before[k], torch.Tensor))


def test_calibration_samples_are_a_limit():
    config = lq.QuantizationConfig("int8", symmetric=False, calibration_samples=3)
    plan = lq.QuantizationPlan([lq.LayerRule("0", "int8", config)])
    model = lq.prepare(nn.Sequential(nn.Linear(2, 2)), plan)
    lq.calibrate(model, [torch.ones(2, 2), torch.tensor([[2.0, 2.0], [50.0, 50.0]]), torch.full((2, 2), 99.0)])
    assert model[0].input_quantizer.observer.max_val < 3


def test_a_layer_of_two_names_is_matched_by_either():
    shared = nn.Linear(3, 3)
    model = nn.ModuleDict({"a": shared, "b": shared})
    lq.prepare(model, lq.QuantizationPlan([lq.LayerRule("b", "int8")]))
    assert isinstance(model["a"], lq.QATLinear)


def test_compiled_models_prepare_and_convert():
    model = nn.Sequential(nn.Linear(4, 4))
    compiled = torch.compile(model, backend="eager")
    assert lq.prepare(compiled, "int8_weight_only") is compiled
    assert lq.prepare(model, "int8_weight_only") is model
    assert isinstance(lq.convert(compiled)[0], lq.QuantizedLinear)


def test_models_with_compiled_parts_are_copied_parts_and_all():
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), torch.compile(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), backend="eager"))

    x, model = torch.randn(3, 8), lq.prepare(build(), "int8")
    lq.calibrate(model, [x])
    converted, plain = lq.convert(model.eval(), verify=[x]), lq.quantize_model(build(), "int8", [x])
    expected = model(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for quantized in (converted, plain):
        assert isinstance(quantized[1]._orig_mod[0], lq.QuantizedLinear)
        torch.testing.assert_close(quantized(x), expected)


@pytest.mark.parametrize(
    "plan", ["int8", "w4a8", "int8_dynamic", lq.QATConfig("int4", group_size=4, activation_bits=None)]
)
def test_converted_models_compile_without_graph_breaks(plan):
    model = trained(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), plan, (3, 8))
    converted = lq.convert(model)
    x = torch.randn(3, 8)
    with torch.no_grad():
        compiled = torch.compile(converted, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), converted(x))


REGIONS = """
import torch, lightning_qat as lq
from torch import nn
x = torch.randn(5, 64)
for plan in ("int8", "nf4"):
    blocks = [nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)) for _ in range(3)]
    model = nn.Sequential(*blocks)
    lq.calibrate(lq.prepare(model, plan), [x])
    lq.apply_phase(model, lq.Phase(observing=False, frozen=True))
    for net in (model, lq.convert(model)):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        with torch.no_grad():
            expected = net(x)
            for block in net:
                block.compile(backend="eager", fullgraph=True)
            torch.testing.assert_close(net(x), expected)
        print("graphs:", torch._dynamo.utils.counters["stats"]["unique_graphs"])
"""


def test_blocks_that_are_compiled_one_by_one_share_their_graphs():
    """Regional compilation: a block's code is compiled once, whatever the others' scales and codes are.

    In a process of its own: hooks that others leave behind in one count as other code.
    """
    done = subprocess.run([sys.executable, "-c", REGIONS], capture_output=True, text=True, check=True, timeout=300)
    assert [line for line in done.stdout.splitlines() if line.startswith("graphs")] == ["graphs: 1"] * 4


def test_learned_scales_are_refused_where_there_is_none_to_learn():
    with pytest.raises(ValueError, match="learnable=True is not allowed with scheme='nf4'"):
        lq.QATConfig("nf4", activation_bits=None, learnable_step_size=True)


def test_the_plans_own_steps_count():
    callback = lq.QuantizationAwareTraining(plan=lq.QATConfig("int8", start_step=5, fold_batchnorm=False))
    assert callback.start_step == 5
    assert not callback.config.fold_batchnorm
