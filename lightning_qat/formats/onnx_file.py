"""What ``torch.onnx`` traced, made ready to be a file: weights of 4 bits packed, notes of the exporter left out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

#: Mark of a DequantizeLinear whose codes take 4 bits in the file; its value is the integer's name in ONNX.
STORED_AS = "lightning_qat.stored_as"
INT4, UINT4 = "INT4", "UINT4"


def finished(program: Any) -> Any:
    """Return the protocol buffer of an exported program, as it is to be written.

    ``torch.onnx`` has no tensors of 4 bits: they are traced in 8, and packed here. It notes for each node where it came
    from, with paths of the machine that wrote the file; in a small network that is a fifth of it.
    """
    proto = program.model_proto
    _pack(proto.graph)
    for described in _described(proto):
        del described.metadata_props[:]
    return proto


def pin(proto: Any, sizes: dict[str, int]) -> list[str]:
    """Write numbers for symbolic dimensions of inputs and outputs, in place; return the inputs' as they now are.

    Args:
        proto: what :func:`finished` returned.
        sizes: of symbols, by name.
    """
    pinned = []
    for value in (*proto.graph.input, *proto.graph.output):
        for place, dimension in enumerate(value.type.tensor_type.shape.dim):
            if dimension.dim_param in sizes:
                dimension.dim_value = sizes[dimension.dim_param]
                if value in proto.graph.input:
                    pinned.append(f"dimension {place} of {value.name!r} is {dimension.dim_value}")
    return pinned


def _described(proto: Any) -> Iterator[Any]:
    yield from (proto, proto.graph)
    for held in (proto.graph, *proto.functions):
        yield from held.node
        yield from held.value_info
    for held in (proto.graph.initializer, proto.graph.input, proto.graph.output):
        yield from held


def _pack(graph: Any) -> None:
    """Give each marked node its codes, and its zero points where it has any, in 4 bits.

    The exporter makes equal initializers one, so others may go on reading those of 8 bits.
    """
    from onnx import TensorProto, numpy_helper

    held = {initializer.name: initializer for initializer in graph.initializer}
    packed: dict[str, Any] = {}
    for node in graph.node:
        kind = next((note.value for note in node.metadata_props if note.key == STORED_AS), None)
        if kind is None:
            continue
        for place in (0, 2)[: len(node.input) - 1]:
            source = held[node.input[place]]
            name = f"{source.name}.{kind.lower()}"
            if name not in packed:
                codes = torch.from_numpy(numpy_helper.to_array(source).copy())
                packed[name] = TensorProto(name=name, data_type=TensorProto.DataType.Value(kind), dims=source.dims)
                packed[name].raw_data = two_a_byte(codes).numpy().tobytes()
            node.input[place] = name
    used = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    kept = [initializer for initializer in graph.initializer if initializer.name in used]
    del graph.initializer[:]
    graph.initializer.extend([*kept, *packed.values()])
    described = [value for value in graph.value_info if value.name in used or value.name not in held]
    del graph.value_info[:]
    graph.value_info.extend(described)


def two_a_byte(codes: Tensor) -> Tensor:
    """Return ``codes`` in one row of bytes, the first of each two in the lower half; a last one beside 0."""
    halves = torch.nn.functional.pad(codes.flatten() & 15, (0, codes.numel() % 2)).to(torch.uint8).reshape(-1, 2)
    return halves[:, 0] | (halves[:, 1] << 4)
