"""Reading GGUF files: the metadata, and tensors of the few types that SmolLM2's file has, dequantized.

The format is that of ggml's documentation (``docs/gguf.md``), version 3, little endian. The package gguf reads more,
but makes an array of each of the 98,000 strings of a vocabulary, which takes seconds.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: Metadata types by number, as struct has them; 8 is a string and 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_BLOCK = 32


@dataclass(frozen=True)
class GGUFFile:
    """What a file holds.

    Args:
        path: of the file.
        facts: the metadata.
        tensors: name -> shape, outermost first, number of the type, and the offset in the file.
    """

    path: Path
    facts: Mapping[str, Any]
    tensors: Mapping[str, tuple[tuple[int, ...], int, int]]

    def read(self, name: str) -> Tensor:
        """Return a tensor in float32; raise ``ValueError`` for a type that is not read here."""
        shape, kind, offset = self.tensors[name]
        if kind not in _TYPES:
            raise ValueError(f"{self.path}: {name!r} has ggml type {kind}; only F32, F16, Q4_1 and Q8_0 are read")
        bytes_per_block, values_per_block, decode = _TYPES[kind]
        count = int(np.prod(shape))
        size = count // values_per_block * bytes_per_block
        stored = np.fromfile(self.path, np.uint8, size, offset=offset)
        if len(stored) < size:
            raise ValueError(f"{self.path} ends within {name!r}; install the package that it comes with again")
        return torch.from_numpy(decode(stored.reshape(-1, bytes_per_block)).reshape(shape))


def read_gguf(path: Path) -> GGUFFile:
    """Return the metadata of a file, and where its tensors are.

    Raises:
        ValueError: the file is not GGUF of version 3, or damaged.
    """
    reader = _Reader(path.read_bytes())
    try:
        if reader.content[:4] != b"GGUF" or reader.skip(4).scalar("I") != 3:
            raise ValueError(f"{path} is not a GGUF file of version 3")
        count, pairs = reader.scalar("Q"), reader.scalar("Q")
        facts = {reader.string(): reader.value(reader.scalar("I")) for _ in range(pairs)}
        infos = [reader.tensor_info() for _ in range(count)]
    except (struct.error, UnicodeDecodeError, KeyError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    alignment = int(facts.get("general.alignment", 32))
    start = -(-reader.position // alignment) * alignment
    return GGUFFile(path, facts, {name: (shape, kind, start + offset) for name, shape, kind, offset in infos})


class _Reader:
    def __init__(self, content: bytes) -> None:
        self.content = content
        self.position = 0

    def skip(self, count: int) -> _Reader:
        self.position += count
        return self

    def scalar(self, code: str) -> Any:
        return self.scalars(code, 1)[0]

    def scalars(self, code: str, count: int) -> tuple[Any, ...]:
        layout = f"<{count}{code}"
        found = struct.unpack_from(layout, self.content, self.position)
        self.position += struct.calcsize(layout)
        return found

    def string(self) -> str:
        length = self.scalar("Q")
        if length > len(self.content) - self.position:
            raise struct.error(f"a string of {length} bytes goes beyond the end")
        text = self.content[self.position : self.position + length].decode()
        self.position += length
        return text

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(_SCALARS[kind])
        element, count = self.scalar("I"), self.scalar("Q")
        if element in _SCALARS:
            return list(self.scalars(_SCALARS[element], count))
        return [self.value(element) for _ in range(count)]

    def tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string()
        shape = self.scalars("Q", self.scalar("I"))
        kind, offset = self.scalar("I"), self.scalar("Q")
        return name, tuple(shape[::-1]), kind, offset


def _half(stored: np.ndarray, start: int) -> np.ndarray:
    """Return the float16 that each block has at a byte, as float32 ``[blocks, 1]``."""
    return stored[:, start : start + 2].copy().view(np.float16).astype(np.float32)


def _q4_1(stored: np.ndarray) -> np.ndarray:
    """A scale, a minimum, and codes: the low nibbles are the first half of the block."""
    packed = stored[:, 4:]
    codes = np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.float32)
    return codes * _half(stored, 0) + _half(stored, 2)


def _q8_0(stored: np.ndarray) -> np.ndarray:
    """A scale and signed codes."""
    return stored[:, 2:].view(np.int8).astype(np.float32) * _half(stored, 0)


#: ggml's number of a type -> bytes and values of a block, and what makes float32 of blocks ``[blocks, bytes]``.
_TYPES: Mapping[int, tuple[int, int, Callable[[np.ndarray], np.ndarray]]] = {
    0: (4, 1, lambda stored: stored.copy().view(np.float32)),
    1: (2, 1, lambda stored: stored.copy().view(np.float16).astype(np.float32)),
    3: (4 + _BLOCK // 2, _BLOCK, _q4_1),
    8: (2 + _BLOCK, _BLOCK, _q8_0),
}
