"""float model -> model that trains with fake quantization, in place."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from types import FunctionType, MethodType
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_qat.config import PlanLike, QuantizationPlan, resolve_plan
from lightning_qat.nn import QATLayer, QuantizedLayer
from lightning_qat.nn.layer import make_qat, unmake_qat
from lightning_qat.quantizers.state import QuantizationState
from lightning_qat.transforms.match import match_layers, merge_layers, settle_layers, split_layers

ModelT = TypeVar("ModelT", bound=nn.Module)

#: Where a prepared model keeps its plan.
_PLAN = "_quantization_plan"


def prepared_plan(model: nn.Module) -> QuantizationPlan | None:
    """Return the plan that ``model`` was prepared with, or None."""
    return model.__dict__.get(_PLAN)


def qat_layers(model: nn.Module) -> Iterator[tuple[str, QATLayer]]:
    """Yield the names and modules of the prepared layers, each module once, in the order of ``named_modules``.

    The walk leaves quantizers out: it is done after every batch, and they are most of a prepared model's modules.
    """
    seen: set[nn.Module] = set()
    ahead: list[tuple[str, nn.Module]] = [("", model)]
    while ahead:
        name, module = ahead.pop()
        if module in seen:
            continue
        seen.add(module)
        if isinstance(module, QATLayer):
            yield name, module
        prefix = f"{name}." if name else ""
        for key, child in reversed(module._modules.items()):
            if child is not None and not isinstance(child, QuantizationState):
                ahead.append((prefix + key, child))


def copy_model(model: ModelT, memo: dict[int, Any] | None = None) -> ModelT:
    """Deep-copy ``model``, also one that keeps graph tensors: pruned weights, losses in a list.

    Raises:
        ValueError: if a function that was put in the place of a ``forward`` holds a module of ``model``: functions are
            not copied, so that the copy would compute with the original.
    """
    memo = {} if memo is None else memo
    own = {id(module) for module in model.modules()}
    for name, module in model.named_modules():
        if "_orig_mod" in module._modules:  # a part that torch.compile wrapped is compiled anew by a copy
            continue
        patched = module.__dict__.get("forward")
        if _compiled_method(patched, module) is None and _holds_one_of(patched, own):
            raise ValueError(
                f"the forward of {name or type(model).__name__!r} is a function that was set on the module and holds "
                "it, so that a copy would go on calling the original; make it a method of a class, or set "
                "types.MethodType(function_of_self, module)"
            )
    for module in model.modules():
        for value in tree_leaves(list(module.__dict__.values())):
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    copied = copy.deepcopy(model, memo)
    for module, twin in zip(model.modules(), copied.modules(), strict=True):
        _uncompile(module, twin)
    return copied


def _uncompile(module: nn.Module, twin: nn.Module) -> None:
    """Give a copy its own methods where those of ``module`` are compiled, as Lightning does and leaves them."""
    for name, value in list(module.__dict__.items()):
        method = _compiled_method(value, module)
        if method is not None:
            twin.__dict__[name] = MethodType(method.__func__, twin)
    if "_compiler_ctx" in twin.__dict__:
        twin.__dict__["_compiler_ctx"] = None


def _compiled_method(value: Any, module: nn.Module) -> Any:
    """Return the method of ``module`` that ``torch.compile`` made ``value`` of, or None."""
    method = getattr(value, "_torchdynamo_orig_callable", None) if isinstance(value, FunctionType) else None
    return method if isinstance(method, MethodType) and method.__self__ is module else None


def _holds_one_of(value: Any, modules: set[int], depth: int = 4) -> bool:
    """Return whether a function has one of ``modules``, or a method of one, around it: what it names or closes over."""
    if not isinstance(value, FunctionType) or not depth:
        return False
    names = (value.__globals__.get(name) for name in value.__code__.co_names)
    held = [*(value.__defaults__ or ()), *(v for v in names if not isinstance(v, FunctionType))]
    for cell in value.__closure__ or ():
        with contextlib.suppress(ValueError):  # an empty cell
            held.append(cell.cell_contents)
    return any(id(getattr(v, "__self__", v)) in modules or _holds_one_of(v, modules, depth - 1) for v in held)


def leave_fast_paths(model: nn.Module) -> None:
    """Make ``nn.TransformerEncoderLayer`` call its layers in evaluation too.

    Its fused inference path reads ``linear1.weight`` and never calls the layer, which would evaluate
    another model than the one that was trained. This flag is read by nothing but that choice.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            quantized = any(isinstance(child, (QATLayer, QuantizedLayer)) for child in module.modules())
            if quantized:
                module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # integer grids are not defined on nested tensors


def prepare(model: ModelT, plan: PlanLike = "int8") -> ModelT:
    """Prepare ``model`` for quantization-aware training, in place.

    Layers take on their QAT class and keep their identity, parameters and names; a float checkpoint
    still loads. Preparing again with an equal plan changes nothing.

    Args:
        model: any ``nn.Module`` or ``LightningModule``.
        plan: a :class:`QuantizationPlan`, :class:`QATConfig`, :class:`QuantizationConfig`
            (weight-only) or a preset's name.

    Returns:
        ``model``.

    Raises:
        ValueError: if the model is prepared with another plan or converted, if a rule matches nothing,
            or if a layer cannot have its config.
    """
    resolved = resolve_plan(plan)
    compiled, model = model, getattr(model, "_orig_mod", model)  # of torch.compile
    known = prepared_plan(model)
    if known is not None:
        if known != resolved:
            raise ValueError(
                f"{type(model).__name__} is already prepared with another plan ({known}); "
                "build a new model, or change bits with set_bits(model, ...)"
            )
        return compiled
    for name, module in model.named_modules():
        if isinstance(module, (QATLayer, QuantizedLayer)):
            state = "prepared" if isinstance(module, QATLayer) else "converted"
            raise ValueError(f"layer {name!r} of {type(model).__name__} is already {state}; prepare a float model")
    done: list[str] = []
    split = split_layers(model)
    try:
        matched = match_layers(model, resolved)
        layers = dict(model.named_modules())
        for name, (weight, activation) in matched.items():
            make_qat(layers[name], weight, activation, name or type(model).__name__)
            done.append(name)
    except BaseException:
        for name in done:
            unmake_qat(layers[name])
        merge_layers(split)
        raise
    settle_layers(split)
    leave_fast_paths(model)
    model.__dict__[_PLAN] = resolved
    return compiled
