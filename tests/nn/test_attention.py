"""QATMultiheadAttention against nn.MultiheadAttention, over its arguments: exact in float, close at 16 bits."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lightning_qat as lq
from lightning_qat.nn.attention import INPUT_PROJECTIONS
from lightning_qat.nn.attention_core import _on_grid

WIDE = lq.QATConfig(bits=16, activation_bits=16, per_channel=True)
HEADS, FEATURES = 2, 8


def attention(**options):
    module = nn.MultiheadAttention(FEATURES, HEADS, **options)
    for parameter in module.parameters():  # about as wide as by default, but for biases, which are zeros there
        nn.init.normal_(parameter, std=0.2)
    return module


def in_float(module):
    return lq.apply_phase(module, lq.Phase(quantizing=False))


@st.composite
def calls(draw):
    """Return the options of a module, its inputs and the arguments of one call."""
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    torch.manual_seed(draw(st.integers(0, 100)))
    options = {
        "bias": pick(True, False),
        "add_bias_kv": pick(True, False),
        "add_zero_attn": pick(True, False),
        "batch_first": pick(True, False),
    }
    same = pick("self", "memory", "apart", "query is key")
    if same == "apart":
        options |= {"kdim": pick(None, 6), "vdim": pick(None, 5)}
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    keys = length if same in ("self", "query is key") else draw(st.integers(1, 5))
    unbatched = pick(True, False)
    batch = 1 if unbatched else batch

    def tensor(n, features):
        x = torch.randn(n, batch, features)
        return x[:, 0] if unbatched else x.transpose(0, 1).contiguous() if options["batch_first"] else x

    query = tensor(length, FEATURES)
    key = query if same in ("self", "query is key") else tensor(keys, options.get("kdim") or FEATURES)
    value = key if same in ("self", "memory") else tensor(keys, options.get("vdim") or FEATURES)
    arguments = {"need_weights": pick(True, False), "average_attn_weights": pick(True, False)}
    mask = pick(None, "bool", "float", "heads", "causal")
    dropped = torch.rand(batch * HEADS, length, keys) < 0.3
    dropped[..., 0] = False  # a row that is left something
    if mask == "causal":
        arguments |= {"attn_mask": torch.ones(length, keys).triu(1).bool(), "is_causal": True}
    elif mask is not None:
        chosen = dropped if mask == "heads" else dropped[0]
        arguments["attn_mask"] = chosen if mask != "float" else torch.zeros(length, keys).masked_fill(chosen, -3.0)
    if pick(True, False):
        padding = torch.rand(batch, keys) < 0.3
        padding[:, 0] = False
        if mask == "float":
            padding = torch.zeros(batch, keys).masked_fill(padding, -torch.inf)
        arguments["key_padding_mask"] = padding[0] if unbatched else padding
    return options, (query, key, value), arguments


def outputs(module, inputs, arguments):
    """Return outputs, probabilities, and the gradients of inputs and parameters."""
    known = {id(x): x.clone().requires_grad_() for x in inputs}
    leaves = [known[id(x)] for x in inputs]  # the same tensors stay the same
    module.zero_grad()
    output, weights = module(*leaves, **arguments)
    torch.manual_seed(1)
    (output * torch.randn_like(output)).sum().backward()
    gradients = [leaf.grad for leaf in known.values()] + [p.grad for p in module.parameters()]
    return [output.detach(), *([] if weights is None else [weights.detach()]), *gradients]


@given(calls(), st.integers(0, 100))
@settings(max_examples=80, deadline=None)
def test_the_float_phase_is_exact_and_sixteen_bits_are_close(call, seed):
    torch.manual_seed(seed)
    options, inputs, arguments = call
    module = attention(**options)
    expected = outputs(module, inputs, arguments)
    prepared = lq.QATMultiheadAttention(copy.deepcopy(module), WIDE)
    in_float(prepared)
    found = outputs(prepared, inputs, arguments)
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    lq.apply_phase(prepared, lq.Phase())
    with torch.no_grad():
        close, wanted = prepared(*inputs, **arguments), expected[: 1 + arguments["need_weights"]]
    for a, b in zip(close, wanted, strict=False):  # the probabilities may be None
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


@given(calls(), st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_converted_is_what_trained(call, seed):
    torch.manual_seed(seed)
    options, inputs, arguments = call
    prepared = lq.prepare(nn.ModuleList([attention(**options)]), "int8")[0]
    outputs(prepared, inputs, arguments)
    prepared.eval()
    batch = dict(zip(("query", "key", "value"), inputs, strict=True)) | arguments
    converted = lq.convert(prepared, verify=[batch])
    assert all(isinstance(layer, lq.QuantizedLinear) for layer in converted.children())
    with torch.no_grad():
        found, expected = converted(**batch), prepared(**batch)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_dropout_draws_the_same_numbers(need_weights, batch_first):
    torch.manual_seed(0)
    module = attention(dropout=0.4, batch_first=batch_first)
    prepared = lq.QATMultiheadAttention(copy.deepcopy(module))
    in_float(prepared)
    x = torch.randn(4, 6, FEATURES)
    for mode in (True, False):
        results = []
        for each in (module.train(mode), prepared.train(mode)):
            torch.manual_seed(7)
            results.append(each(x, x, x, need_weights=need_weights)[0])  # with gradients there is no fast path
        assert torch.equal(*results)


def test_rows_that_may_look_at_nothing():
    module = attention(batch_first=True)
    prepared = lq.QATMultiheadAttention(copy.deepcopy(module))
    x = torch.randn(2, 3, FEATURES)
    padding = torch.tensor([[False, True, True], [True, True, True]])
    in_float(prepared)
    for need_weights in (True, False):
        arguments = {"key_padding_mask": padding, "need_weights": need_weights}
        with torch.enable_grad():
            expected = module(x, x, x, **arguments)[0]
        if need_weights:  # the float module has NaN there, which has no range
            assert expected[1].isnan().all()
            with pytest.raises(ValueError, match=r"'out_proj' observed NaN.*mask with a finite value"):
                prepared(x, x, x, **arguments)
            found = prepared.eval()(x, x, x, **arguments)[0]
            prepared.train()
        else:
            found = prepared(x, x, x, **arguments)[0]
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.nan_to_num(), expected.nan_to_num())
    lq.apply_phase(prepared, lq.Phase())
    assert prepared(x, x, x, key_padding_mask=padding, need_weights=False)[0].isfinite().all()


@pytest.mark.parametrize("config", ["int8", "w4a8", "int8_weight_only"])
def test_packed_and_separate_weights_agree(config):
    torch.manual_seed(0)
    packed, separate = attention(), attention(kdim=FEATURES, vdim=FEATURES)
    separate._qkv_same_embed_dim = False
    for name, part in zip(INPUT_PROJECTIONS, packed.in_proj_weight.detach().chunk(3), strict=True):
        separate.register_parameter(f"{name}_weight", nn.Parameter(part.clone()))
    separate.in_proj_weight = None
    for name in ("in_proj_bias", "out_proj"):
        setattr(separate, name, copy.deepcopy(getattr(packed, name)))
    one, other = (lq.QATMultiheadAttention(module, config) for module in (packed, separate))
    x, y = torch.randn(4, 3, FEATURES), torch.randn(5, 3, FEATURES)
    for inputs in ((x, x, x), (x, y, y)):
        assert torch.equal(one(*inputs)[0], other(*inputs)[0])
    one(x, x, x)[0].square().sum().backward()
    other(x, x, x)[0].square().sum().backward()
    parts = torch.cat([getattr(separate, f"{name}_weight").grad for name in INPUT_PROJECTIONS])
    assert torch.equal(packed.in_proj_weight.grad, parts)


@pytest.mark.parametrize("need_weights", [True, False])
def test_weights_alone_are_those_of_the_functional_form(need_weights):
    torch.manual_seed(0)
    module = attention()
    prepared = lq.QATMultiheadAttention(copy.deepcopy(module), "int8_weight_only")
    x = torch.randn(4, 3, FEATURES)
    found = prepared(x, x, x, need_weights=need_weights)[0]

    def on_its_grid(weight):  # a symmetric scale for each row; packed or not makes no difference
        scale = weight.detach().abs().amax(1) / 127
        return lq.fake_quantize(weight, scale, axis=0)

    expected = nn.functional.multi_head_attention_forward(
        x, x, x, FEATURES, HEADS, on_its_grid(module.in_proj_weight), module.in_proj_bias, None, None, False, 0.0,
        on_its_grid(module.out_proj.weight), module.out_proj.bias, need_weights=need_weights,
    )[0]  # fmt: skip
    torch.testing.assert_close(found, expected)
    for output in (found, expected):
        output.square().sum().backward()
    for (name, a), b in zip(prepared.named_parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


def freeze_with_room(prepared):
    """Let scales stand still and cut nothing off."""
    lq.apply_phase(prepared, lq.Phase(observing=False, frozen=True))
    for layer in prepared.children():
        layer.input_quantizer.scale.mul_(1.2)
        layer.weight_quantizer.scale.mul_(1.2)


@given(calls(), st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_gradients_are_those_of_the_fake_quantized_inputs_and_weights(call, seed):
    torch.manual_seed(seed)
    options, inputs, arguments = call
    module = attention(**options)
    prepared = lq.QATMultiheadAttention(copy.deepcopy(module), WIDE)
    prepared(*inputs, **arguments)
    freeze_with_room(prepared)
    expected, found = outputs(module, inputs, arguments), outputs(prepared, inputs, arguments)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3 * max(1.0, float(b.abs().max())))


@given(calls(), st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_quantized_products(call, seed):
    torch.manual_seed(seed)
    options, inputs, arguments = call
    module = attention(**options)
    float_products = lq.QATMultiheadAttention(copy.deepcopy(module), WIDE)
    wide = lq.QATMultiheadAttention(copy.deepcopy(module), WIDE, quantize_products=True)
    in_float(wide)
    expected, found = outputs(module, inputs, arguments), outputs(wide, inputs, arguments)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    float_products(*inputs, **arguments)
    for each in (wide, float_products):
        freeze_with_room(each)
    for a, b in zip(outputs(wide, inputs, arguments), outputs(float_products, inputs, arguments), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3 * max(1.0, float(b.abs().max())))
    lq.apply_phase(wide, lq.Phase())
    lq.set_bits(wide, 4, activations=True)
    batch = dict(zip(("query", "key", "value"), inputs, strict=True)) | arguments
    converted = lq.convert(wide.eval(), verify=[batch])
    assert converted.product_bits == 4
    with torch.no_grad():
        output, weights = wide(**batch)
        torch.testing.assert_close(converted(**batch)[0], output, rtol=1e-4, atol=1e-4)
    if weights is not None and not arguments["average_attn_weights"]:
        rows = weights.flatten(0, -2)
        assert all(row.unique().numel() <= 16 for row in rows)


def test_products_are_quantized_row_by_row():
    torch.manual_seed(0)
    module = lq.QATMultiheadAttention(attention(bias=False), WIDE, quantize_products=True)
    q, k, v = (torch.randn(HEADS * 3, 5, FEATURES // HEADS) for _ in range(3))

    def rounded(x, steps, low):  # along the last dimension, in float64 as written down
        x = x.double()
        scale = x.abs().amax(-1, keepdim=True) / steps
        return (x / scale).round().clamp(low, steps) * scale

    probabilities = (rounded(q / math.sqrt(FEATURES // HEADS), 127, -127) @ rounded(k, 127, -127).mT).softmax(-1)
    weights = rounded(probabilities, 255, 0)
    expected = (weights @ rounded(v.mT, 127, -127).mT).transpose(0, 1).reshape(15, FEATURES)
    found, kept = module._attend_in_steps(q, k, v, None, torch.Size((5, 3, FEATURES)), 8)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(kept.flatten(0, 1).double(), weights, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_rounding_noise_does_not_move_the_largest_of_a_row(bits):
    torch.manual_seed(0)
    x = torch.randn(2000, 16)
    noisy = x * (1 + torch.randn_like(x) * 2.0**-24)
    largest = x.abs().argmax(1, keepdim=True)
    step = x.abs().amax() / 2 ** (bits - 1)
    moved = (_on_grid(x, bits) - _on_grid(noisy, bits)).abs().gather(1, largest)
    assert moved.max() < 1e-3 * step


def test_the_float_module_may_ask_for_quantized_products(tmp_path):
    module = nn.ModuleList([attention(batch_first=True)])
    module[0].quantize_products = True
    lq.prepare(module, "int8")
    x, mask = torch.randn(2, 4, FEATURES), torch.ones(4, 4).triu(1).bool()
    module[0](x, x, x, attn_mask=mask, is_causal=True, need_weights=False)
    module.eval()
    converted = lq.convert(module)
    lq.save_quantized(converted, tmp_path / "model")
    loaded = lq.load_quantized(tmp_path / "model", nn.ModuleList([attention(batch_first=True)]))
    assert loaded[0].product_bits == 8
    results = [
        m[0](x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0] for m in (module, converted, loaded)
    ]
    assert torch.equal(results[1], results[2])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)
    module[0].quantize_products = False
    assert not torch.equal(module[0](x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0], results[0])


def counted(module):
    """Note which projections' observers look at a tensor."""
    seen = []
    for name in INPUT_PROJECTIONS:
        observer = getattr(module, name).input_quantizer.observer
        update = observer.update

        def tell(x, name=name, update=update):
            seen.append(name)
            return update(x)

        observer.update = tell
    return seen


def test_the_same_tensor_is_observed_once_and_known_to_all():
    module = lq.QATMultiheadAttention(attention())
    alike, seen = lq.QATMultiheadAttention(attention()), counted(module)
    x, y = torch.randn(4, 2, FEATURES), torch.randn(3, 2, FEATURES) * 5
    module(x, x, x)
    assert seen == ["q_proj"]
    states = [getattr(module, name).input_quantizer.state_dict() for name in INPUT_PROJECTIONS]
    for key, value in states[0].items():
        assert all(torch.equal(value, s[key]) if isinstance(value, torch.Tensor) else value == s[key] for s in states)
    seen.clear()
    module(x, y, y)
    assert seen == ["q_proj", "k_proj"]
    assert module.v_proj.input_quantizer.scale == module.k_proj.input_quantizer.scale
    assert module.v_proj.input_quantizer.scale != module.q_proj.input_quantizer.scale
    seen.clear()
    module(x, x, x)  # their ranges differ now, so each is on its own for good
    assert seen == ["q_proj", "k_proj"]
    alike.load_state_dict(module.state_dict())
    assert [getattr(alike, name).input_quantizer.alone for name in INPUT_PROJECTIONS] == [False, True, False]
    module.eval()
    converted = lq.convert(module)
    for inputs in ((x, x, x), (x, y, y)):
        torch.testing.assert_close(converted(*inputs)[0], module(*inputs)[0], rtol=1e-4, atol=1e-4)


def test_projections_in_different_bits_do_not_share():
    module = lq.QATMultiheadAttention(attention())
    x = torch.randn(4, 2, FEATURES)
    module(x, x, x)
    lq.set_bits(module, 4, "k_proj", activations=True)
    lq.set_bits(module, 2, "v_proj")
    module(x, x, x)
    assert module.k_proj.input_quantizer.bits == 4
    assert module.k_proj.input_quantizer.scale > module.q_proj.input_quantizer.scale
    assert module.v_proj.weight_codes().unique().numel() <= 4
    module.eval()
    assert lq.check_parity(module, lq.convert(module), [(x, x, x)]).passed


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_an_empty_batch(masked, need_weights):
    """A detector that found nothing asks with no rows, and is answered with none."""
    module, x = attention(batch_first=True), torch.randn(3, 5, FEATURES)
    empty, arguments = x[:0], {"need_weights": need_weights}
    if masked:
        arguments |= {"key_padding_mask": torch.zeros(0, 5, dtype=torch.bool), "attn_mask": torch.zeros(5, 5).bool()}
    lq.calibrate(lq.prepare(module, "int8"), [(x, x, x)])
    for quantized in (module, lq.convert(module)):
        output, weights = quantized(empty, empty, empty, **arguments)
        assert output.shape == (0, 5, FEATURES)
        assert weights is None if not need_weights else weights.shape == (0, 5, 5)
