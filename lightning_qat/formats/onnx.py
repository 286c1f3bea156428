"""ONNX files with QuantizeLinear and DequantizeLinear, as onnxruntime and other engines read them.

Integer weights are int8 initializers, each with a DequantizeLinear: per tensor, per channel, or in blocks; they are
int4 or uint4 where no input is quantized and 4 bits hold them. A static input passes a QuantizeLinear and a
DequantizeLinear on its own grid; one with dynamic ranges is computed on as integers where it can be (MatMulInteger),
scales being found in the graph. A convolution whose output no layer quantizes is a matrix product. BatchNorm that
conversion folded is gone. The model is traced by ``torch.export``, so it has to be what that takes.

onnxruntime multiplies by weights per tensor, per channel or in blocks of 16, 32, 64 and so on as they are packed, but
by default with inputs that it quantizes to 8 bits itself, which is three times as fast for one token. Its session
option ``session.qdq_matmulnbits_accuracy_level`` set to 1 keeps them in float32, as here.
"""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_unflatten

from lightning_qat.formats.onnx_file import finished, pin
from lightning_qat.formats.traceable import make_traceable
from lightning_qat.nn import QATLayer, QuantizedLayer
from lightning_qat.transforms.prepare import copy_model
from lightning_qat.transforms.without_cache import without_cache

#: The first with DequantizeLinear in blocks.
OPSET = 21
_INSTALL = "pip install onnx onnxscript"

logger = logging.getLogger(__name__)


def write_onnx(model: nn.Module, path: Path, example: Any) -> Path:
    """Write a converted model as one ONNX file.

    A dimension of the example that the model's code turns into a number, as ``len(x)`` does, is that number in the
    file; a warning names it.

    Args:
        model: converted, in float32.
        path: of the file.
        example: a tensor, a tuple of positional or a dict of keyword arguments. The first dimension of every tensor may
            vary later, of integer tensors (ids, masks) the second too, as far as the model lets them.

    Raises:
        ValueError: if the model is not converted, or ONNX has no operator for a layer's format; it is named.
        FileExistsError: if ``path`` is there already.
        ModuleNotFoundError: onnx or onnxscript is not installed.
    """
    if any(isinstance(module, QATLayer) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} is prepared but not converted; export convert(model)")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}
    if not layers:
        raise ValueError(f"{type(model).__name__} holds no quantized layer; export convert(model) of a prepared model")
    if example is None:
        raise ValueError("format='onnx' traces the model and needs a batch to do so; give example=batch")
    if path.exists():
        raise FileExistsError(f"{path} is there already; choose another path, or delete it")
    traced = copy_model(getattr(model, "_orig_mod", model)).cpu().eval()
    for name, module in traced.named_modules():
        if isinstance(module, QuantizedLayer):
            make_traceable(name, module)
    program = _trace(traced, example)
    _name_outputs(program)
    proto = finished(program)
    _say_what_is_fixed(pin(proto, _fixed(program.exported_program)))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
        (Path(folder) / path.name).write_bytes(proto.SerializeToString())
        os.replace(Path(folder) / path.name, path)
    return path


def _trace(model: nn.Module, example: Any) -> Any:
    args, kwargs = (), {}
    if isinstance(example, dict):
        kwargs = dict(example)
    else:
        args = tuple(example) if isinstance(example, (tuple, list)) else (example,)
    shapes: Any = {name: _free(value) for name, value in kwargs.items()} if kwargs else tuple(map(_free, args))
    try:
        with warnings.catch_warnings(), without_cache(model):
            warnings.simplefilter("ignore")  # of versions and of names that torch.onnx makes up itself
            return torch.onnx.export(
                model,
                args,
                kwargs=kwargs,
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=shapes,
                external_data=False,
                verbose=False,
            )
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"ONNX files are written with onnx and onnxscript; run: {_INSTALL}") from error


def _free(value: Any) -> Any:
    """Return which dimensions of an argument may vary."""
    if not isinstance(value, Tensor):
        return None
    count = 1 if value.is_floating_point() else 2
    return dict.fromkeys(range(min(count, value.dim())), torch.export.Dim.AUTO)


def _name_outputs(program: Any) -> None:
    """Give the outputs of a model that returns a dict, as those of transformers do, its keys as names.

    ``key.0``, ``key.1``, ... where a key holds several.
    """
    spec, values = program.exported_program.module_call_graph[0].signature.out_spec, program.model.graph.outputs
    made = tree_unflatten(list(range(spec.num_leaves)), spec)
    if not isinstance(made, Mapping) or len(values) != spec.num_leaves:
        return
    taken = {value.name for node in program.model.graph for value in node.outputs} | {v.name for v in values}
    taken |= {value.name for value in program.model.graph.inputs} | set(program.model.graph.initializers)
    for key, part in made.items():
        places = tree_leaves(part)
        for i, place in enumerate(places):
            name = str(key) if isinstance(part, int) else f"{key}.{i}"
            if name not in taken and values[place].producer() is not None:  # an input that comes out has its own
                values[place].name = name


def _fixed(exported: Any) -> dict[str, int]:
    """Return the sizes that the trace left a symbol, but holds for one value only: the exporter writes the symbol."""
    found = {}
    for node in exported.graph.nodes:
        if node.op != "placeholder" or not isinstance(node.meta.get("val"), Tensor):
            continue
        for size in node.meta["val"].shape:
            allowed = exported.range_constraints.get(getattr(getattr(size, "node", None), "expr", None))
            if allowed is None:
                continue
            hint = size.node.hint
            # One is left as 1 to 2: sizes of 1 and of more are traced apart.
            if allowed.lower == hint and allowed.upper in (hint, 2):
                found[str(size)] = int(hint)
    return found


def _say_what_is_fixed(pinned: list[str]) -> None:
    if pinned:
        logger.warning(
            "the model was traced for these sizes only, and the file takes no others: %s. Code that reads len(x) or "
            "int(x.shape[0]) does that; with x.shape[0] or x.size(0) the size may vary",
            ", ".join(pinned),
        )
