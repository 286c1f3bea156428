"""What has no code is found wherever it stands, and told alike with compiled kernels and without."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from tensors import DTYPES, randn

from lightning_qat.native.library import without_native
from lightning_qat.schemes.finite import check_finite


@pytest.mark.parametrize("way", [nullcontext, without_native])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_the_first_is_named_wherever_it_stands(way, dtype: torch.dtype, bad: float) -> None:
    for rows, columns in ((1, 1), (1, 15), (3, 17), (129, 1025)):
        x = randn(rows, columns).to(dtype)
        for layout in (x, x.t(), x.flatten()[::2]):
            layout = layout.clone() if layout.dim() == 2 else layout
            with way():
                check_finite(layout)
                for place in {0, layout.numel() // 2, layout.numel() - 1}:
                    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(place), layout.shape))
                    kept, layout[index] = layout[index].clone(), bad
                    with pytest.raises(ValueError, match=rf"holds {bad} at index \({', '.join(map(str, index))}"):
                        check_finite(layout)
                    layout[index] = kept


def test_an_empty_tensor_is_finite() -> None:
    check_finite(torch.empty(0, 3))
