"""Writing converted models as files that other libraries load."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

# Imported for what they register.
from lightning_qat.formats import awq, bitsandbytes_model, compressed_tensors, gptq  # noqa: F401
from lightning_qat.formats.contents import Contents, check_no_order, contents_of
from lightning_qat.formats.model_format import get_format
from lightning_qat.nn import FoldedBatchNorm

CONFIG = "config.json"
TENSORS = "model.safetensors"
ONNX = "onnx"
#: Files of a tokenizer, as ``save_pretrained`` names them.
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)


@torch.no_grad()
def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    format: str,
    *,
    tokenizer: Any = None,
    example: Any = None,
) -> Path:
    """Write a converted model in the format of another library.

    ``"gptq"``, ``"gptq_v2"``, ``"awq"``, ``"bitsandbytes"`` and ``"compressed_tensors"`` make a folder with
    ``model.safetensors`` and ``config.json``. Of a model of transformers, or a module that wraps one and nothing else,
    ``AutoModel...from_pretrained(path)`` loads it. ``"onnx"`` makes one file with QuantizeLinear and DequantizeLinear.
    Codes are those of the model, always. Scales are rounded once where the format has fewer bits for them: to float16
    in GPTQ and AWQ, to the model's dtype in compressed-tensors.

    Args:
        model: what :func:`lightning_qat.convert` or :func:`lightning_qat.quantize_model` returned.
        path: a folder that is not there yet, or is empty; of ONNX a file.
        format: one of the above.
        tokenizer: what to put beside a model of transformers: a folder whose tokenizer files are copied, or an object
            with ``save_pretrained``.
        example: for ONNX only: a batch, as :func:`lightning_qat.calibrate` takes one; its size may vary later.

    Returns:
        ``path``.

    Raises:
        ValueError: if the format cannot hold something of the model. It names the layer, the value and the way out, and
            nothing was written.
        FileExistsError: if ``path`` is there already.
    """
    if format == ONNX:
        from lightning_qat.formats.onnx import write_onnx  # needs packages that the others do not

        return write_onnx(model, Path(path), example)
    kind = get_format(format, (ONNX,))
    contents = contents_of(model)
    if not kind.holds_order:
        check_no_order(contents, format)
    config = kind.config(contents)
    with new_folder(Path(path)) as folder:
        tensors = contents.float_tensors()
        for name, layer in contents.layers.items():
            written = kind.write(layer, config)
            tensors |= {f"{name}.{end}" if name else end: tensor.contiguous() for end, tensor in written.items()}
        save_file(tensors, str(folder / TENSORS), metadata={"format": "pt"})
        _write_config(contents, config, folder)
        if tokenizer is not None:
            _write_tokenizer(tokenizer, folder)
    return Path(path)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``path`` if nothing fails, and vanishes otherwise."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} is there already; choose another path, or delete it")
    path.parent.mkdir(parents=True, exist_ok=True)
    workspace = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        fresh = workspace / "new"  # with the mode that folders have, which mkdtemp's do not
        fresh.mkdir()
        yield fresh
        os.replace(fresh, path)
    finally:
        shutil.rmtree(workspace)


def _write_config(contents: Contents, config: dict[str, Any], folder: Path) -> None:
    model: Any = contents.model
    facts: dict[str, Any] = {}
    if contents.is_pretrained:
        model.config.save_pretrained(folder)
        facts = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        generation = getattr(model, "generation_config", None)
        if generation is not None and model.can_generate():
            generation.save_pretrained(folder)
    else:
        facts["folded_norms"] = [n for n, m in model.named_modules() if isinstance(m, FoldedBatchNorm)]
    facts |= {
        "architectures": [type(model).__name__],
        "dtype": str(contents.dtype).removeprefix("torch."),
        "quantization_config": config,
    }
    (folder / CONFIG).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _write_tokenizer(tokenizer: Any, folder: Path) -> None:
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)
        return
    source = Path(tokenizer)
    found = [source / name for name in _TOKENIZER if (source / name).is_file()]
    if not found:
        raise ValueError(f"tokenizer={str(source)!r} holds no tokenizer files; give a folder with {_TOKENIZER[0]}")
    for file in found:
        shutil.copy2(file, folder / file.name)
