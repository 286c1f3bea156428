"""Tokenizers as functions from text to token ids: of a model folder, and one that needs no file."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

#: Text to token ids, without special tokens.
Tokenizer: TypeAlias = Callable[[str], list[int]]


def byte_tokenizer() -> Tokenizer:
    """Return the ids 0 to 255: the bytes of the text in UTF-8."""
    return _bytes


def _bytes(text: str) -> list[int]:
    return list(text.encode())


def folder_tokenizer(path: str) -> Tokenizer:
    """Return the tokenizer of a model folder of transformers, from its ``tokenizer.json``.

    Raises:
        ModuleNotFoundError: tokenizers is not installed.
        FileNotFoundError: there is no such file.
    """
    return _encoder(read_tokenizer(Path(path).expanduser()))


def read_tokenizer(folder: Path) -> Any:
    """Return ``tokenizers.Tokenizer`` of the file ``tokenizer.json`` in a folder."""
    try:
        from tokenizers import Tokenizer as Pipeline
    except ImportError as error:
        raise ModuleNotFoundError(f"{folder} is read with tokenizers; run: pip install tokenizers") from error
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there; give a model folder with a tokenizer.json")
    return Pipeline.from_file(str(file))


def package_folder(name: str, message: str) -> Path:
    """Return the folder of an installed package without importing it; raise ``ModuleNotFoundError(message)``."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(message)
    return Path(spec.submodule_search_locations[0])


def _encoder(pipeline: Any) -> Tokenizer:
    def encode(text: str) -> list[int]:
        ids: list[int] = pipeline.encode(text, add_special_tokens=False).ids
        return ids

    return encode
