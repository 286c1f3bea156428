"""What lies between the projections of an attention: heads, masks, softmax, as PyTorch computes it.

Both products, of queries with keys and of probabilities with values, may be quantized too. Their ranges are found at
run time, one for each row that is summed over: there is nothing to calibrate, and rows do not see each other's range.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_qat.quantizers.dynamic_range import dynamic_parameters
from lightning_qat.schemes import TensorFormat, get_scheme

#: Below 8 bits a symmetric scale puts the largest magnitude of a row halfway between two codes, where float rounding,
#: which differs between training and the converted model, decides for one. Scales this much larger leave it the nearer.
_OFF_THE_TIE = 1.0 + 2.0**-10


def _on_grid(x: Tensor, bits: int, *, symmetric: bool = True) -> Tensor:
    """Return ``x`` fake-quantized, with a range for each row along its last dimension."""
    fmt = TensorFormat("int8", bits, symmetric, dynamic=True)
    scale, zero_point, fmt = dynamic_parameters(x, fmt, None)
    if symmetric and bits < 8:
        scale = scale * _OFF_THE_TIE
    return get_scheme(fmt.scheme).fake_quantize(x, scale, zero_point, fmt)


class CalledProjections(nn.MultiheadAttention):
    """An ``nn.MultiheadAttention`` that calls its projections as layers.

    ``forward`` repeats ``F.multi_head_attention_forward`` step by step, so that it rounds alike; there is no fused
    path, which would read float weights.
    """

    def _project(self, query: Tensor, key: Tensor, value: Tensor, packed: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return the projections of ``[L, N, E]``, ``[S, N, kdim]`` and ``[S, N, vdim]``.

        The same tensors are one object. With ``packed`` PyTorch would take one product for the key and the value.
        """
        raise NotImplementedError

    def _product_bits(self) -> int | None:
        """Return the bits of the products now; None is float."""
        return None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return what ``nn.MultiheadAttention`` returns of the same arguments, with quantized projections."""
        if query.is_nested or key.is_nested or value.is_nested:
            raise ValueError(f"{type(self).__name__} takes no nested tensors; pad them and give key_padding_mask")
        batched = F._mha_shape_check(  # type: ignore[attr-defined]
            query, key, value, key_padding_mask, attn_mask, self.num_heads
        )
        q, k, v = self._sequence_first(query, key, value, batched)
        if k.shape[:2] != v.shape[:2] or q.shape[1] != k.shape[1]:
            shapes = f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"
            raise ValueError(f"key and value need the same length, and all the same batch size: {shapes}")
        if key_padding_mask is not None and not batched:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        mask, padding = self._float_masks(attn_mask, key_padding_mask, q.dtype)
        if is_causal and mask is None:
            raise RuntimeError("is_causal is a hint about attn_mask, which is None; give the causal attn_mask too")
        bits = self._product_bits()
        if is_causal and padding is None and not need_weights:
            mask = None  # the hint is enough
        else:
            is_causal = is_causal and padding is None
            mask = None if mask is None else self._checked(mask, (q.shape[0], k.shape[0]), q.shape[1])
        shape = q.shape
        heads, mask = self._heads(*self._project(q, k, v, batched and v is k), mask, padding)
        if is_causal and mask is None and bits is not None:  # as the fused function takes the hint, added keys included
            mask = q.new_full((1, q.shape[0], heads[1].shape[1]), -math.inf).triu(1)
        if need_weights or bits is not None:
            attended, weights = self._attend_in_steps(*heads, mask, shape, bits)
        else:
            attended, weights = self._attend(*heads, mask, shape, is_causal), None
        output = self.out_proj(attended).view(shape)
        if not batched:
            output = output.squeeze(1)
        elif self.batch_first:
            output = output.transpose(1, 0)
        if weights is None or not need_weights:
            return output, None
        weights = weights.mean(dim=1) if average_attn_weights else weights
        return output, weights if batched else weights.squeeze(0)

    def _sequence_first(self, query: Tensor, key: Tensor, value: Tensor, batched: bool) -> tuple[Tensor, ...]:
        """Return ``[L, N, E]`` of each; the same tensors stay the same object."""

        def laid_out(x: Tensor) -> Tensor:
            if not batched:
                return x.unsqueeze(1)
            return x.transpose(1, 0) if self.batch_first else x

        q = laid_out(query)
        k = q if key is query else laid_out(key)
        return q, k, k if value is key else laid_out(value)

    @staticmethod
    def _float_masks(
        mask: Tensor | None, padding: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return masks to add to the scores; True becomes ``-inf``."""
        other = F._none_or_dtype(mask)
        padding = F._canonical_mask(padding, "key_padding_mask", other, "attn_mask", dtype)
        return F._canonical_mask(mask, "attn_mask", None, "", dtype, check_other=False), padding

    def _checked(self, mask: Tensor, lengths: tuple[int, int], batch: int) -> Tensor:
        """Return ``mask`` as ``[1, L, S]`` or ``[N * heads, L, S]``."""
        expected = lengths if mask.dim() == 2 else (batch * self.num_heads, *lengths)
        if mask.shape != torch.Size(expected):
            raise RuntimeError(f"attn_mask has the shape {list(mask.shape)}, which should be {list(expected)}")
        return mask.unsqueeze(0) if mask.dim() == 2 else mask

    def _heads(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, padding: Tensor | None
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | None]:
        """Return ``[N * heads, length, head_dim]`` of each with the added keys, and both masks as one."""
        batch = q.shape[1]
        added = 0
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.repeat(1, batch, 1)])
            v = torch.cat([v, self.bias_v.repeat(1, batch, 1)])
            added += 1
        q, k, v = (x.view(x.shape[0], batch * self.num_heads, self.head_dim).transpose(0, 1) for x in (q, k, v))
        if self.add_zero_attn:
            zeros = (k.shape[0], 1, self.head_dim)
            k = torch.cat([k, torch.zeros(zeros, dtype=k.dtype, device=k.device)], dim=1)
            v = torch.cat([v, torch.zeros(zeros, dtype=v.dtype, device=v.device)], dim=1)
            added += 1
        if added:
            mask = None if mask is None else F.pad(mask, (0, added))
            padding = None if padding is None else F.pad(padding, (0, added))
        if padding is not None:
            keys = k.shape[1]
            if padding.shape != torch.Size((batch, keys)):
                raise ValueError(
                    f"key_padding_mask has the shape {[padding.shape[0], padding.shape[1] - added]}, "
                    f"which should be {[batch, keys - added]}"
                )
            padding = padding.view(batch, 1, 1, keys).expand(-1, self.num_heads, -1, -1)
            padding = padding.reshape(batch * self.num_heads, 1, keys)
            mask = padding if mask is None else mask + padding
        return (q, k, v), mask

    def _attend_in_steps(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, shape: torch.Size, bits: int | None
    ) -> tuple[Tensor, Tensor]:
        """Return ``[L * N, E]`` and the probabilities ``[N, heads, L, S]``."""
        length, batch, features = shape
        q = q * math.sqrt(1.0 / float(self.head_dim))
        if bits is not None:  # the values' columns are what is summed over
            q, k, v = _on_grid(q, bits), _on_grid(k, bits), _on_grid(v.transpose(1, 2), bits).transpose(1, 2)
        keys = k.transpose(-2, -1)
        scores = torch.bmm(q, keys) if mask is None else torch.baddbmm(mask, q, keys)
        weights = F.softmax(scores, dim=-1)
        if bits is not None:
            weights = _on_grid(weights, bits, symmetric=False)  # from 0 up
        if self.training and self.dropout > 0.0:
            weights = F.dropout(weights, p=self.dropout)
        attended = torch.bmm(weights, v).transpose(0, 1).reshape(length * batch, features)
        return attended, weights.view(batch, self.num_heads, length, k.shape[1])

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, shape: torch.Size, is_causal: bool
    ) -> Tensor:
        """Return ``[L * N, E]``."""
        length, batch, features = shape
        if mask is not None:
            one_for_all = mask.shape[0] == 1
            mask = mask.unsqueeze(0) if one_for_all else mask.view(batch, self.num_heads, mask.shape[1], k.shape[1])
        q, k, v = (x.view(batch, self.num_heads, x.shape[1], self.head_dim) for x in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        return attended.permute(2, 0, 1, 3).reshape(length * batch, features)
