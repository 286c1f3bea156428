"""Embeddings: weight-only, quantized after the look-up, so that only the rows in use are touched."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_qat.config import PlanLike
from lightning_qat.nn.layer import QATLayer, QuantizedLayer, register_layer
from lightning_qat.nn.single import init_from
from lightning_qat.schemes import get_scheme, rows_of_scale


class QATEmbedding(QATLayer, nn.Embedding):
    """An ``nn.Embedding`` with a fake-quantized table ``[num_embeddings, embedding_dim]``.

    Args:
        embedding: the float layer.
        config: a config or a preset's name; a channel is a row.
    """

    float_class = nn.Embedding
    quantizes_input = False

    def __init__(self, embedding: nn.Embedding, config: PlanLike = "int8", quantize_activations: bool = False) -> None:
        init_from(self, embedding, config, quantize_activations)

    def forward(self, input: Tensor) -> Tensor:
        # The look-up comes first: it renormalizes (max_norm) and makes sparse gradients as the float layer does.
        rows = nn.Embedding.forward(self, input)
        return self.weight_quantizer.fake_quantize_rows(rows, input, self.weight)


class QuantizedEmbedding(QuantizedLayer, nn.Embedding):
    """A converted ``nn.Embedding``: gathers packed rows and dequantizes those."""

    float_class = nn.Embedding
    quantizes_input = False

    def forward(self, input: Tensor) -> Tensor:
        rows, features = self.weight_shape
        fmt, packed = self.weight_format, self.weight_packed
        if not rows or (features * fmt.bits % 8 and packed.numel() != rows * features):
            return F.embedding(input, self.weight_in(self.weight_dtype))  # rows that do not end on a byte
        index = input.reshape(-1)
        scheme = get_scheme(fmt.scheme)
        codes = scheme.unpack(packed.reshape(rows, -1)[index].reshape(-1), torch.Size((index.numel(), features)), fmt)
        scale = self.held_scale()
        zero_point: Tensor | None = self.weight_zero_point
        if scale.dim():
            scale, zero_point = rows_of_scale(scale, zero_point, index, fmt, self.weight_shape)
        values = scheme.dequantize(codes, scale, zero_point, fmt, self.weight_dtype)
        return values.reshape(*input.shape, features)


register_layer(QATEmbedding, QuantizedEmbedding)
