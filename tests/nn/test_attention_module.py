"""QATMultiheadAttention as a module: state dicts, copies, dtypes, errors, checkpointing, compiled."""

import copy
import pickle

import pytest
import torch
from torch import nn

import lightning_qat as lq
from lightning_qat.nn.attention import merge

HEADS, FEATURES = 2, 8


def attention(**options):
    module = nn.MultiheadAttention(FEATURES, HEADS, **options)
    for parameter in module.parameters():  # the default biases are zeros
        nn.init.normal_(parameter, std=0.4)
    return module


def test_float_checkpoints_load_and_come_back():
    module = attention(kdim=6, vdim=5)
    prepared = lq.QATMultiheadAttention(attention(kdim=6, vdim=5))
    names = {name for name, _ in prepared.named_parameters()}
    assert names == {name for name, _ in module.named_parameters()}
    prepared.load_state_dict(module.state_dict(), strict=True)
    assert torch.equal(prepared.k_proj.weight, module.k_proj_weight)
    assert prepared.k_proj.weight is prepared.k_proj_weight
    attention(kdim=6, vdim=5).load_state_dict(lq.float_state_dict(prepared.state_dict()), strict=True)
    merge(prepared)
    assert type(prepared) is nn.MultiheadAttention
    assert prepared.state_dict().keys() == module.state_dict().keys()


def test_one_module_is_made_and_the_float_one_stays():
    module = attention()
    prepared = lq.QATMultiheadAttention(module, "w4a8")
    assert type(module) is nn.MultiheadAttention
    assert type(module.out_proj) is not type(prepared.out_proj)
    assert prepared.in_proj_weight is module.in_proj_weight
    assert prepared.out_proj.weight is module.out_proj.weight
    assert all(layer.weight_quantizer.bits == 4 for layer in prepared.children())
    only_weights = lq.QATMultiheadAttention(module, "w4a8", quantize_activations=False)
    assert all(layer.input_quantizer is None for layer in only_weights.children())
    for wrong in (prepared, nn.Linear(2, 2)):
        with pytest.raises(ValueError, match=r"made from an nn\.MultiheadAttention"):
            lq.QATMultiheadAttention(wrong)


def test_copies_and_pickles_are_whole():
    prepared = lq.QATMultiheadAttention(attention())
    x = torch.randn(4, 2, FEATURES)
    expected = prepared(x, x, x)[0]
    for twin in (copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
        assert torch.equal(twin.eval()(x, x, x)[0], prepared.eval()(x, x, x)[0])
        assert twin.q_proj.attention is twin
        with torch.no_grad():
            twin.in_proj_weight.zero_()
        assert not twin.q_proj.weight.any()
        assert prepared.q_proj.weight.any()
    assert torch.equal(prepared.train()(x, x, x)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    prepared = lq.QATMultiheadAttention(attention()).to(dtype)
    x = torch.randn(4, 2, FEATURES, dtype=dtype)
    output = prepared(x, x, x)[0]
    output.float().square().sum().backward()
    assert output.dtype is dtype
    assert prepared.in_proj_weight.grad.dtype is dtype
    converted = lq.convert(prepared.eval())
    assert lq.sqnr(prepared(x, x, x)[0].float(), converted(x, x, x)[0].float()) > 25


def test_wrong_calls_say_what_is_wrong():
    prepared = lq.QATMultiheadAttention(attention())
    x = torch.randn(4, 2, FEATURES)
    with pytest.raises(RuntimeError, match="is_causal is a hint about attn_mask"):
        prepared(x, x, x, is_causal=True)
    with pytest.raises(RuntimeError, match=r"attn_mask has the shape \[3, 4\], which should be \[4, 4\]"):
        prepared(x, x, x, attn_mask=torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"key_padding_mask has the shape \[2, 3\], which should be \[2, 4\]"):
        prepared(x, x, x, key_padding_mask=torch.zeros(2, 3))
    with pytest.raises(ValueError, match="the same length"):
        prepared(x, x, x[:3])
    with pytest.raises(ValueError, match="nested"):
        prepared(*[torch.nested.nested_tensor([x[:2, 0], x[:3, 0]])] * 3)


def test_activation_checkpointing_changes_nothing():
    torch.manual_seed(0)
    one = lq.QATMultiheadAttention(attention())
    other = copy.deepcopy(one)
    x = torch.randn(4, 2, FEATURES)
    one(x, x, x)[0].square().sum().backward()
    repeated = torch.utils.checkpoint.checkpoint(lambda t: other(t, t, t)[0], x, use_reentrant=False)
    repeated.square().sum().backward()
    assert torch.equal(one.in_proj_weight.grad, other.in_proj_weight.grad)
    for a, b in zip(one.buffers(), other.buffers(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("need_weights", [True, False])
def test_compiles_without_graph_breaks(need_weights):
    torch.manual_seed(0)
    prepared = lq.QATMultiheadAttention(attention(batch_first=True))
    x = torch.randn(2, 4, FEATURES)
    prepared(x, x, x)
    prepared.eval()
    compiled = torch.compile(prepared, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(
            compiled(x, x, x, need_weights=need_weights)[0], prepared(x, x, x, need_weights=need_weights)[0]
        )
    prepared.train()
    twin = copy.deepcopy(prepared)
    compiled(x, x, x)[0].square().sum().backward()
    twin(x, x, x)[0].square().sum().backward()
    torch.testing.assert_close(prepared.in_proj_weight.grad, twin.in_proj_weight.grad)
    assert torch.equal(prepared.v_proj.input_quantizer.scale, twin.v_proj.input_quantizer.scale)
