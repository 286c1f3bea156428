"""Benchmark group ``inference``: converted models against float32, beside what other libraries make of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_qat.config import PRESETS
from lightning_qat.metrics import sqnr
from lightning_qat.transforms import calibrate, convert, prepare

from ._benchmark_networks import convolutional_network
from ._benchmark_peers import LINEAR_PEERS, NETWORK_PEERS, Form, Peer, forward_of, told, working_peers
from ._timing import Results, Timing, compared

_NETWORK_PRESETS = ("int8", "int8_dynamic")
_LINEAR_PRESETS = (*_NETWORK_PRESETS, "int8_dynamic_per_tensor", "int8_weight_only", "w4a16")

#: Layers that are run one after the other as a model's are, so that no cache holds their weights: 512 MB in float32.
_LAYERS = 8

#: Below this a converted model does not compute what was trained, and its speed means nothing.
_LEAST_SQNR = 40.0


def inference_group(rounds: int, features: int = 4096, batches: tuple[int, ...] = (1, 32, 256)) -> Results:
    """Time a large Linear and a small convolutional network, in evaluation, at several batch sizes.

    Raises:
        RuntimeError: if a converted model does not compute what the fake-quantized one does.
    """
    samples, images = torch.randn(64, features), torch.randn(64, 3, 32, 32)
    layer = nn.Sequential(nn.Linear(features, features))
    linear, notes = _forms(layer, samples, _LINEAR_PRESETS, LINEAR_PEERS)
    linear |= _in_bfloat16(layer, samples)
    results = Results(notes=notes)
    for batch in batches:
        results += _timed(f"inference Linear {features}, batch {batch}", linear, torch.randn(batch, features), rounds)
    results += _stack(rounds, features, samples)
    model = convolutional_network()
    model(images)  # BatchNorm takes statistics of the data, as in a trained network
    network, notes = _forms(model, images, _NETWORK_PRESETS, NETWORK_PEERS)
    results += Results(notes=notes)
    for batch in (1, 64):
        results += _timed(f"inference conv-bn-relu x6, batch {batch}", network, torch.randn(batch, 3, 32, 32), rounds)
    return results


def _stack(rounds: int, features: int, samples: Tensor) -> Results:
    """Time several large Linears in a row on one token, which is what decoding text does."""
    layers = nn.Sequential(*(nn.Linear(features, features) for _ in range(_LAYERS)))
    for layer in layers:  # outputs as large as inputs
        nn.init.normal_(layer.weight, std=features**-0.5)  # type: ignore[arg-type]
    forms, notes = _forms(layers, samples, _LINEAR_PRESETS, LINEAR_PEERS)
    forms |= _in_bfloat16(layers, samples)
    name = f"inference {_LAYERS} Linears {features} in a row, batch 1"
    return Results(notes=notes) + _timed(name, forms, torch.randn(1, features), rounds)


def _forms(
    model: nn.Module, samples: Tensor, presets: tuple[str, ...], peers: tuple[Peer, ...]
) -> tuple[dict[str, Form], list[str]]:
    """Return the verified forms of ``model``, float first, and why a peer is not among them."""
    found = {"float": Form(forward_of(model.eval()))}
    for preset in presets:
        if preset in PRESETS:
            found[f"lightning_qat {preset}"] = _converted(model, samples, preset)
    others, notes = working_peers(peers, model, samples)
    return found | others, notes


def _converted(model: nn.Module, samples: Tensor, preset: str) -> Form:
    prepared = prepare(copy.deepcopy(model), preset)
    calibrate(prepared, [samples])
    converted = convert(prepared.eval())
    x = samples
    for trained, ours in _parts(prepared, converted):
        found, x = forward_of(ours)(x), forward_of(trained)(x)
        if sqnr(x, found) < _LEAST_SQNR:
            raise RuntimeError(f"the converted {preset} model is not the fake-quantized one; not timed")
    run = forward_of(converted)
    return Form(run, float(sqnr(forward_of(model)(samples), run(samples))))


def _parts(prepared: nn.Module, converted: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """Return what has to compute the same from the same input: Linears in a row each, or the whole network.

    A code that float rounding tips over tips others in the layers after it.
    """
    pairs = list(zip(prepared.children(), converted.children(), strict=True))
    return pairs if all(isinstance(layer, nn.Linear) for layer, _ in pairs) else [(prepared, converted)]


def _in_bfloat16(model: nn.Module, samples: Tensor) -> dict[str, Form]:
    """Return the model in bfloat16, and with weights of 4 bits besides."""
    expected = forward_of(model)(samples)
    packed = convert(prepare(copy.deepcopy(model), "w4a16"))
    found = {}
    for name, form in {"float bfloat16": copy.deepcopy(model), "lightning_qat w4a16, bfloat16": packed}.items():
        run = forward_of(form.bfloat16())
        found[name] = Form(_with_casts(run), float(sqnr(expected, _with_casts(run)(samples))))
    return found


def _with_casts(run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: run(x.bfloat16()).float()


def _timed(group: str, forms: dict[str, Form], x: Tensor, rounds: int) -> Results:
    """Time the forms that take a batch of this size."""
    cases, notes = {}, []
    for name, form in forms.items():
        try:
            form.run(x)
        except Exception as error:
            if name == "float" or name.startswith("lightning_qat"):
                raise
            notes.append(f"{name} is not timed in {group}: {told(error)}")
            continue
        cases[name] = _case(form, x)
    timings = compared(group, cases, rounds, baseline="float")
    return Results([_with_sqnr(timing, forms[timing.name]) for timing in timings], notes)


def _case(form: Form, x: Tensor) -> Callable[[], Tensor]:
    return lambda: form.run(x)


def _with_sqnr(timing: Timing, form: Form) -> Timing:
    return replace(timing, sqnr_db=form.sqnr_db)
