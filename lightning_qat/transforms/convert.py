"""trained model -> new model holding packed integers: the fake quantizer's own codes, carried over."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm, SpectralNormLoadStateDictPreHook
from torch.nn.utils.weight_norm import WeightNorm

from lightning_qat.nn import (
    FoldedBatchNorm,
    QATLayer,
    QATMultiheadAttention,
    QuantizedConv2d,
    QuantizedLinear,
    keep_codes_inside,
)
from lightning_qat.nn.attention import own_projections
from lightning_qat.nn.computed_weight import weight_now
from lightning_qat.nn.layer import make_quantized, unmake_qat
from lightning_qat.nn.norm import norm_factor_and_shift
from lightning_qat.nn.recurrent import RecurrentLayer, own_weights, prepared_names
from lightning_qat.quantizers.fake_quantizer import ActivationQuantizer
from lightning_qat.quantizers.input_arrangement import ARRANGEMENT
from lightning_qat.quantizers.learned_scale import LearnedScale, check_scales
from lightning_qat.quantizers.sharded import is_sharded
from lightning_qat.schemes import TensorFormat, get_scheme
from lightning_qat.transforms.certificate import inherit_fit_report
from lightning_qat.transforms.fuse import trace_folds
from lightning_qat.transforms.prepare import _PLAN, copy_model, leave_fast_paths, qat_layers
from lightning_qat.transforms.save_pretrained import refuse_save_pretrained
from lightning_qat.transforms.unobserved import unobserved

ModelT = TypeVar("ModelT", bound=nn.Module)

_TINY = torch.finfo(torch.float32).tiny


def _copy_without_weights(model: ModelT) -> ModelT:
    """Deep-copy ``model``; weights that only prepared layers own are not copied, they become codes."""
    for name, tensor in model.named_parameters():
        if is_sharded(tensor):
            raise RuntimeError(
                f"{name!r} is sharded over ranks, so no rank holds the model to convert; save a whole checkpoint with "
                "ModelParallelStrategy(save_distributed_checkpoint=False), then prepare(module, plan), "
                "module.load_state_dict(torch.load(path)['state_dict']) and convert(module) in one process"
            )
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), set()).add(id(module))
    memo: dict[int, Any] = {}
    prepared = {id(layer): layer for _, layer in qat_layers(model)}
    for layer in prepared.values():
        weight = layer._parameters.get("weight")
        if weight is not None and owners[id(weight)] <= prepared.keys():
            memo[id(weight)] = weight
    return copy_model(model, memo)


def _local_name(layer_name: str, quantizer_name: str, norm_name: str) -> str:
    """Translate ``norm_name`` from the model that was prepared to the one being converted.

    A LightningModule may be prepared and its ``model`` attribute converted, or the other way round.
    """
    if quantizer_name.endswith(layer_name):
        return norm_name.removeprefix(quantizer_name[: len(quantizer_name) - len(layer_name)])
    return layer_name[: len(layer_name) - len(quantizer_name)] + norm_name


def _norm_of(model: nn.Module, name: str, layer: QATLayer) -> nn.Module | None:
    folded = layer.weight_quantizer.folded_norm
    if not folded:
        return None
    local = _local_name(name, layer.weight_quantizer.name, folded)
    try:
        return model.get_submodule(local)
    except AttributeError:
        raise ValueError(
            f"layer {name!r} takes in the BatchNorm {folded!r}, which {type(model).__name__} does not hold; "
            "convert the whole model that was prepared"
        ) from None


def _fold_into_codes(
    codes: Tensor, scale: Tensor, zero_point: Tensor, factor: Tensor, fmt: TensorFormat, axis: int
) -> tuple[Tensor, Tensor, Tensor, TensorFormat]:
    """Multiply a weight, given as codes, by ``factor`` per output channel without quantizing it anew.

    The scale takes ``|factor|`` and the codes its sign. Where a code has no negative (the lowest of a
    full-range grid), the scale keeps the sign. A channel whose factor is 0 gets codes of value 0.
    """
    if fmt.group_size is None:
        scale = scale.expand(factor.numel()).clone()
        zero_point = zero_point.expand(factor.numel()).clone()
        fmt = replace(fmt, axis=axis)
    by_row = factor.view(-1, *[1] * (scale.dim() - 1))
    by_channel = [1] * codes.dim()
    by_channel[axis] = -1
    top = 0 if fmt.symmetric else 2**fmt.bits - 1
    flipped = (top - codes.to(torch.int32)).clamp_(max=2 ** (fmt.bits - 1) - 1 if fmt.symmetric else top)
    exact = (top - flipped == codes.to(torch.int32)).transpose(0, axis).flatten(1).all(1)
    flips = (factor < 0) & exact.to(factor.device)
    codes = torch.where(flips.view(by_channel), flipped.to(codes.dtype), codes)
    flips_row = flips.view(by_row.shape)
    zero_point = torch.where(flips_row, top - zero_point, zero_point)
    sign = torch.where(by_row < 0, torch.where(flips_row, 1.0, -1.0), 1.0)
    folded = (scale.double() * by_row.abs()).float()
    dead = folded < _TINY
    scale = torch.where(dead, scale, folded * sign.float())
    if dead.any():
        nothing = zero_point.expand(scale.shape)
        rows = codes.transpose(0, axis).reshape(*scale.shape, -1)
        rows = torch.where(dead.unsqueeze(-1), nothing.unsqueeze(-1).to(codes.dtype), rows)
        codes = rows.reshape(codes.transpose(0, axis).shape).transpose(0, axis).contiguous()
    return codes, scale, zero_point, fmt


def _input_tensors(
    quantizer: ActivationQuantizer | None,
) -> tuple[TensorFormat | None, dict[str, Tensor | None]]:
    if quantizer is None:
        return None, {"input_scale": None, "input_zero_point": None}
    if quantizer.format.dynamic:
        return quantizer.format, {"input_scale": None, "input_zero_point": None}
    return quantizer.format, {"input_scale": quantizer.scale.clone(), "input_zero_point": quantizer.zero_point.clone()}


def _float_weight(layer: QATLayer) -> Tensor:
    """Return the weight that an evaluation of the layer computes with."""
    weight = weight_now(layer).detach()
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        index = torch.arange(weight.shape[0], device=weight.device)
        weight = torch.embedding_renorm_(weight.clone(), index, layer.max_norm, layer.norm_type)
    return weight


def strip_reparametrization(layer: nn.Module) -> None:
    """Replace computed tensors of a layer, or of its BatchNorm, by their values as they are now."""
    if parametrize.is_parametrized(layer):
        # ``remove_parametrizations`` deletes the property from the class, which the original shares.
        layer.eval()
        values = {name: getattr(layer, name).detach() for name in layer.parametrizations}  # type: ignore[union-attr]
        layer.__class__ = type(layer).__bases__[0]
        del layer._modules["parametrizations"]
        for name, value in values.items():
            layer.register_parameter(name, nn.Parameter(value, requires_grad=False))
    for hook in list(layer._forward_pre_hooks.values()):
        if isinstance(hook, WeightNorm):
            remove_weight_norm(layer, hook.name)
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(layer, hook.name)
            _drop_loading_hook(layer)
        elif isinstance(hook, prune.BasePruningMethod):
            name = f"{hook._tensor_name}_orig"  # which is written to, and may be another model's
            layer._parameters[name] = nn.Parameter(getattr(layer, name).detach().clone(), requires_grad=False)
            prune.remove(layer, hook._tensor_name)


def _drop_loading_hook(layer: nn.Module) -> None:
    """Remove what asks state dicts for the tensors of a spectral norm: PyTorch wraps the hook and leaves it behind."""
    hooks = layer._load_state_dict_pre_hooks
    for key in [k for k, h in hooks.items() if isinstance(getattr(h, "hook", h), SpectralNormLoadStateDictPreHook)]:
        del hooks[key]


def _convert_layer(name: str, layer: QATLayer, norm: nn.Module | None) -> None:
    weight, quantizer = _float_weight(layer), layer.weight_quantizer
    scale, zero_point = (t.clone() for t in quantizer.parameters_for(weight))
    # An infinite weight leaves a finite scale: ranges are cut at the largest float32.
    if weight.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(weight))).all()):
        raise ValueError(f"the weight of layer {name!r} holds NaN or inf; train from a checkpoint before it broke")
    fmt = quantizer.format
    if not bool(torch.isfinite(get_scheme(fmt.scheme).effective_scale(scale, fmt)).all()):
        raise ValueError(f"the weight of layer {name!r} has magnitudes beyond {fmt.scheme}; use another scheme for it")
    codes = get_scheme(fmt.scheme).quantize(weight, scale, zero_point, fmt)
    input_format, tensors = _input_tensors(layer.input_quantizer)
    tensors |= {name: None if (t := quantizer._buffers[name]) is None else t.clone() for name in ARRANGEMENT}
    axis, feeds_one_layer = layer.channel_axis, bool(quantizer.feeds_one_layer)
    unmake_qat(layer)
    strip_reparametrization(layer)
    if norm is not None:
        strip_reparametrization(norm)
        factor, shift = norm_factor_and_shift(norm, layer.bias)  # type: ignore[arg-type]
        codes, scale, zero_point, fmt = _fold_into_codes(codes, scale, zero_point, factor, fmt, axis)
        layer.register_parameter("bias", nn.Parameter(shift.to(weight.dtype), requires_grad=False))
    scheme = get_scheme(fmt.scheme)
    tensors |= {"weight_packed": scheme.pack(codes, fmt), "weight_zero_point": zero_point}
    tensors |= {f"weight_scale{end}": tensor for end, tensor in scheme.store_scale(scale, fmt).items()}
    if fmt.symmetric:
        tensors["weight_zero_point"] = None
    if input_format is not None and input_format.symmetric:
        tensors["input_zero_point"] = None
    make_quantized(layer, fmt, input_format, tensors, weight.shape, weight.dtype, feeds_one_layer=feeds_one_layer)


def drop_norm(norm: nn.Module) -> None:
    """Turn a BatchNorm that was folded into one that passes its input on, in place."""
    for holder in (norm._parameters, norm._buffers):
        holder.clear()
    norm.__class__ = FoldedBatchNorm


@torch.no_grad()
def convert_layers(model: nn.Module, layers: Iterable[tuple[str, QATLayer]]) -> None:
    """Convert some of the prepared layers of ``model`` in place, with the BatchNorm that they take in.

    It is decided before which BatchNorm that is. Attentions and recurrent layers convert as a whole: all
    weights of one, or none.

    Args:
        model: a prepared model, or one of which other layers are converted already.
        layers: names and modules.

    Raises:
        ValueError: an activation was never observed, or a weight is not finite.
    """
    chosen = list(layers)
    inputs = {name: layer.input_quantizer for name, layer in chosen}
    unseen = [name for name, quantizer in inputs.items() if quantizer is not None and not quantizer.calibrated]
    if unseen:
        raise unobserved(unseen, inputs)
    converting = {id(layer) for _, layer in chosen}
    for module in model.modules():
        if isinstance(module, QATMultiheadAttention) and any(id(child) in converting for child in module.children()):
            own_projections(module, module.planned_product_bits())
        elif isinstance(module, RecurrentLayer) and any(id(child) in converting for child in module.children()):
            own_weights(module, prepared_names(module))
    found = [(name, layer, _norm_of(model, name, layer)) for name, layer in chosen]
    for name, layer, norm in found:
        _convert_layer(name, layer, norm)
    for _, _, norm in found:
        if norm is not None and not isinstance(norm, FoldedBatchNorm):
            drop_norm(norm)


def finish_conversion(model: nn.Module) -> None:
    """Do what is left to do in place when all layers of ``model`` are converted."""
    model.__dict__.pop(_PLAN, None)
    leave_fast_paths(model)
    keep_codes_inside(model, QuantizedConv2d, (QuantizedConv2d, QuantizedLinear))
    refuse_save_pretrained(model)
    model.eval()


@torch.no_grad()
def convert(
    model: ModelT,
    verify: Iterable[Any] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> ModelT:
    """Return a new model that holds packed integers where ``model`` has prepared layers.

    The codes are those of the fake quantizers, bit for bit; BatchNorm that directly follows a layer is
    folded by scaling its codes' scale. The result is in evaluation mode, of the same class and call
    signature. ``model`` is left untouched and can train on.

    Args:
        model: a prepared ``nn.Module`` or ``LightningModule``.
        verify: batches, as :func:`calibrate` takes them, that both models are run on: see
            :func:`check_parity`. The report stays with the result, and saving it writes it as the certificate.
            None takes over what :class:`QuantizationAwareTraining` found at the end of a fit, if nothing changed since.
        forward: called as ``forward(model, batch)`` to run a batch of ``verify`` otherwise.

    Raises:
        ValueError: if nothing is prepared, an activation was never observed, or a weight is not finite.
        ParityError: if the result is not what trained; it names the first layer that is not.
    """
    original: ModelT = getattr(model, "_orig_mod", model)  # of torch.compile
    if not any(True for _ in qat_layers(original)):
        raise ValueError(f"{type(original).__name__} has no prepared layer to convert; call prepare(model, plan) first")
    check_scales([part for part in original.modules() if isinstance(part, LearnedScale)])
    converted = _copy_without_weights(original)
    trace_folds(converted)
    convert_layers(converted, qat_layers(converted))
    finish_conversion(converted)
    inherit_fit_report(original, converted)
    if verify is not None:
        from lightning_qat.transforms.parity import certify  # the gate stands on conversion

        certify(original, converted, verify, forward)
    return converted
