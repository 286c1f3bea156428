"""Does a module compile as one graph, with fake quantization as without?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_qat.config import PlanLike
from lightning_qat.testing.parity import prepared_copy
from lightning_qat.transforms.calibrate import _call
from lightning_qat.transforms.phase import Phase, apply_phase
from lightning_qat.transforms.prepare import copy_model

_PHASES = {
    "float training": Phase(quantizing=False),
    "quantized training": Phase(),
    "frozen scales": Phase(observing=False, frozen=True),
}


def assert_compile_fullgraph(
    module: nn.Module,
    batch: Any,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    *,
    config: PlanLike = "int8",
    backend: str = "aot_eager",
) -> None:
    """Assert that the prepared module compiles without a graph break, at most once for each phase, and trains.

    In each phase it runs twice, forward and backward, compiled and not, and outputs and gradients are compared.

    Args:
        module: prepared, or a float one, of which a copy is prepared and calibrated on ``batch``. It stays as it is.
        batch: a tensor, a tuple of positional or a dict of keyword arguments.
        forward: called as ``forward(module, batch)`` instead, for anything else.
        config: what a float module is prepared with.
        backend: of ``torch.compile``.

    Raises:
        AssertionError: naming the phase, and the cause of the break or the tensor that differs.
    """
    run = forward or _call
    name = type(module).__name__
    plain = copy_model(module)
    plain.__dict__.pop("_trainer", None)
    prepared = prepared_copy(module, [batch], config, forward)
    with torch.random.fork_rng():
        broken = _compiled(plain.train(), batch, run, backend)[1]
        if isinstance(broken, Exception):
            raise AssertionError(
                f"{name} does not compile as one graph without quantization either: {_first_lines(broken)}"
            )
        eager = copy_model(prepared).train()
        counted = _Counted(backend)
        model: Any = torch.compile(prepared.train(), backend=counted, fullgraph=True)
        for done, (phase_name, phase) in enumerate(_PHASES.items(), 1):
            apply_phase(prepared, phase)
            apply_phase(eager, phase)
            for _ in range(2):
                expected = _trained(eager, batch, run)
                try:
                    actual = _trained(model, batch, run)
                except Exception as error:
                    raise AssertionError(
                        f"{name} does not compile as one graph in {phase_name}: {_first_lines(error)}"
                    ) from error
                _compare(name, phase_name, expected, actual)
            if counted.graphs > done:
                raise AssertionError(
                    f"{name} was compiled {counted.graphs} times until {phase_name}; once for each of {done} phases "
                    "is allowed (TORCH_LOGS=recompiles tells why)"
                )


class _Counted:
    """A backend that counts the graphs it compiles."""

    def __init__(self, backend: str) -> None:
        self.backend = torch._dynamo.lookup_backend(backend)
        self.graphs = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        return self.backend(graph, inputs)


def _compiled(model: nn.Module, batch: Any, run: Callable[[nn.Module, Any], Any], backend: str) -> tuple[Any, Any]:
    try:
        compiled: Any = torch.compile(model, backend=backend, fullgraph=True)
        return run(compiled, batch), None
    except Exception as error:  # noqa: BLE001 - the compiler raises many kinds
        return None, error


def _trained(model: nn.Module, batch: Any, run: Callable[[nn.Module, Any], Any]) -> dict[str, Tensor]:
    """Return outputs and gradients by name, of one step with the same random numbers each time."""
    torch.manual_seed(0)
    model.zero_grad(set_to_none=True)
    outputs = [leaf for leaf in tree_leaves(run(model, batch)) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    learnable = [output for output in outputs if output.requires_grad]
    if learnable:
        torch.autograd.backward([output.float().square().mean() for output in learnable])
    found = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
    parameters = getattr(model, "_orig_mod", model).named_parameters()
    return found | {f"the gradient of {name!r}": p.grad for name, p in parameters if p.grad is not None}


def _compare(name: str, phase: str, expected: dict[str, Tensor], actual: dict[str, Tensor]) -> None:
    for key, value in expected.items():
        if key not in actual:
            raise AssertionError(f"compiled, {name} in {phase} lacks {key}")
        try:
            torch.testing.assert_close(actual[key], value)
        except AssertionError as error:
            raise AssertionError(f"compiled, {name} in {phase} differs in {key}: {error}") from None


def _first_lines(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])}"
