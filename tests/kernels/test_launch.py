"""A kernel that was launched before is found again by all that decides which variant a launch needs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from triton.compiler import CompiledKernel

from lightning_qat.kernels import launch as launch_file
from lightning_qat.kernels.launch import launch


class Compiled(CompiledKernel):
    def __init__(self, log: list[Any]) -> None:
        self.log = log

    def __del__(self) -> None:
        """Nothing was loaded."""

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.log.append(("again", grid, arguments))


class Kernel:
    """Stands for a ``triton.jit`` function."""

    def __init__(self) -> None:
        self.log: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def first(*arguments: Any, **named: Any) -> Compiled:
            self.log.append(("compile", grid, arguments, named))
            return Compiled(self.log)

        return first

    @property
    def what(self) -> list[str]:
        return [entry[0] for entry in self.log]


@pytest.fixture(autouse=True)
def _nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_file, "_COMPILED", type(launch_file._COMPILED)())


def aligned(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(64, dtype=dtype)


def test_the_same_launch_goes_to_what_was_compiled() -> None:
    kernel, x, y = Kernel(), aligned(), aligned()
    launch(kernel, (7,), (x, 5, 0.5), {"BLOCK": 64}, num_warps=4)
    launch(kernel, (9, 2), (y, 5, 0.5), {"BLOCK": 64}, num_warps=4)
    first, again = kernel.log
    assert first == ("compile", (7,), (x, 5, 0.5), {"BLOCK": 64, "num_warps": 4})
    assert again[:2] == ("again", (9, 2, 1))
    assert again[2][0] is y
    assert again[2][1:] == (5, 0.5, 64)  # constants stand in their places


@pytest.mark.parametrize(
    ("arguments", "constants", "options"),
    [
        ((aligned(torch.float16), 5), {"BLOCK": 64}, {"num_warps": 4}),
        ((aligned()[1:], 5), {"BLOCK": 64}, {"num_warps": 4}),  # whose address is no multiple of 16
        ((aligned(), 1), {"BLOCK": 64}, {"num_warps": 4}),
        ((aligned(), 5), {"BLOCK": 32}, {"num_warps": 4}),
        ((aligned(), 5), {"BLOCK": 64}, {"num_warps": 8}),
    ],
    ids=["dtype", "alignment", "number", "constant", "option"],
)
def test_another_variant_is_compiled(
    arguments: tuple[Any, ...], constants: dict[str, int], options: dict[str, int]
) -> None:
    kernel = Kernel()
    launch(kernel, (1,), (aligned(), 5), {"BLOCK": 64}, num_warps=4)
    launch(kernel, (1,), arguments, constants, **options)
    launch(Kernel(), (1,), (aligned(), 5), {"BLOCK": 64}, num_warps=4)
    assert kernel.what == ["compile", "compile"]


def test_the_oldest_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_file, "_MOST_COMPILED", 2)
    kernel = Kernel()
    for size in (1, 2, 3, 3, 1):
        launch(kernel, (1,), (aligned(), size), {})
    assert kernel.what == ["compile", "compile", "compile", "again", "compile"]
