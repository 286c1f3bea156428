"""Benchmark group ``inference``: converted models against float32, beside PyTorch's own integer models."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_qat.metrics import sqnr
from lightning_qat.transforms import calibrate, convert, prepare

from ._benchmark_train_step import convolutional_network
from ._timing import Timing, compared

#: Below this a converted model does not compute what was trained, and its speed means nothing.
_LEAST_SQNR = 40.0


def inference_group(rounds: int, features: int = 4096, batches: tuple[int, ...] = (1, 32, 256)) -> list[Timing]:
    """Time a large Linear and a small convolutional network, in evaluation, at several batch sizes.

    Raises:
        RuntimeError: if a converted model does not compute what the fake-quantized one does.
    """
    timings: list[Timing] = []
    linears = _models(nn.Sequential(nn.Linear(features, features)), torch.randn(64, features), _dynamic_peer)
    for batch in batches:
        x = torch.randn(batch, features)
        timings += compared(f"inference Linear {features}, batch {batch}", _runs(linears, x), rounds, baseline="float")
    network = _models(convolutional_network(), torch.randn(64, 3, 32, 32), _fx_peer)
    for batch in (1, 64):
        x = torch.randn(batch, 3, 32, 32)
        group = f"inference conv-bn-relu x6, batch {batch}"
        timings += compared(group, _runs(network, x), rounds, baseline="float")
    return timings


def _models(
    model: nn.Sequential, samples: Tensor, peer: Callable[[nn.Module, Tensor], nn.Module]
) -> dict[str, nn.Module]:
    model.eval()
    found: dict[str, nn.Module] = {"float": model}
    for preset in ("int8", "int8_dynamic"):
        prepared = prepare(copy.deepcopy(model), preset)
        calibrate(prepared, [samples])
        converted = convert(prepared)
        with torch.no_grad():
            if sqnr(prepared.eval()(samples), converted(samples)) < _LEAST_SQNR:
                raise RuntimeError(f"the converted {preset} model is not the fake-quantized one; not timed")
        found[f"lightning_qat {preset}"] = converted
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and what people have
        return {**found, _PEERS[peer]: peer(copy.deepcopy(model), samples)}


def _dynamic_peer(model: nn.Module, samples: Tensor) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def _fx_peer(model: nn.Module, samples: Tensor) -> nn.Module:
    from torch.ao import quantization as ao
    from torch.ao.quantization import quantize_fx

    observed = quantize_fx.prepare_fx(model, ao.get_default_qconfig_mapping("x86"), (samples,))
    observed(samples)
    return quantize_fx.convert_fx(observed)


def _runs(models: dict[str, nn.Module], x: Tensor) -> dict[str, Callable[[], Tensor]]:
    def run(model: nn.Module) -> Callable[[], Tensor]:
        @torch.inference_mode()
        def forward() -> Tensor:
            output: Tensor = model(x)
            return output

        return forward

    return {name: run(model) for name, model in models.items()}


#: What the peers are called in the table.
_PEERS: dict[Callable[[nn.Module, Tensor], nn.Module], str] = {
    _dynamic_peer: "torch.ao dynamic, per tensor",
    _fx_peer: "torch.ao FX",
}
