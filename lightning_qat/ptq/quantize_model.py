"""Post-training quantization in one call."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor, nn

from lightning_qat.config import PlanLike, QuantizationPlan, resolve_plan
from lightning_qat.nn import QATLayer, QuantizedLayer
from lightning_qat.ptq.adopt import own_parameters
from lightning_qat.ptq.engine import Engine
from lightning_qat.ptq.equalization import equalize
from lightning_qat.ptq.journal import Journal, fingerprint
from lightning_qat.ptq.methods import METHODS, PTQOptions, method_of
from lightning_qat.ptq.outcome import PTQObserver, PTQReport, attach_ptq_report
from lightning_qat.ptq.preflight import check_tasks, preflight, unknown_weights
from lightning_qat.ptq.rounding import round_model
from lightning_qat.ptq.streaming import WeightStream
from lightning_qat.ptq.weight_files import MatchedWeights, WeightFiles, has_meta_parameters
from lightning_qat.transforms.calibrate import calibrate
from lightning_qat.transforms.convert import convert as convert_model
from lightning_qat.transforms.convert import finish_conversion
from lightning_qat.transforms.prepare import copy_model, prepare, prepared_plan, qat_layers
from lightning_qat.transforms.ranges import static_quantizers
from lightning_qat.validation import check_choice

logger = logging.getLogger(__name__)

ModelT = TypeVar("ModelT", bound=nn.Module)


def quantize_model(
    model: ModelT,
    config: PlanLike | None = None,
    calibration: Iterable[Any] | None = None,
    method: str | None = None,
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    options: PTQOptions | None = None,
    verify: bool = False,
    convert: bool = True,
    observer: PTQObserver | None = None,
    journal: str | os.PathLike[str] | None = None,
    restart: bool = False,
    weights: WeightFiles | str | os.PathLike[str] | None = None,
) -> ModelT:
    """Return a new, quantized model; :func:`ptq_report` says what became of each layer.

    Args:
        model: a float ``nn.Module`` or ``LightningModule``; it stays as it is and shares nothing with the result. No
            second copy of the weights that are quantized is made on the way. Or a prepared one: scales that QAT has
            learned or frozen are the grid of the codes.
        config: a plan, a :class:`QATConfig`, a :class:`QuantizationConfig` (weight-only) or a preset's name; None is
            ``"int8"``, or the plan of a prepared model.
        calibration: batches, as :func:`calibrate` takes them; needed where activations have calibrated ranges, and by
            every method but ``"rtn"``. They also show which BatchNorm directly follows a layer. Padded positions of an
            ``attention_mask`` do not count, as there; the report's notes say in how many layers.
        method: what chooses the codes, a name of ``METHODS``; None follows from the config: ``"gptq"`` and ``"awq"``
            for the schemes of these names, else ``"rtn"``, every weight to the nearest code.
        forward: called as ``forward(model, batch)`` to run a batch otherwise.
        options: of the methods that look at batches, and of evening out the channels of convolutions before.
        verify: compare the result with the fake-quantized model on the calibration batches, which then have to be a
            collection; saving writes the certificate. Layers then stay in float until all are done.
        convert: False returns a prepared model, whose weights and frozen scales are those chosen: QAT goes on from it.
        observer: is told what will be done and what was.
        journal: a folder that keeps finished blocks; a run that is killed and called again goes on from there, and ends
            with the same bytes.
        restart: delete what another run has left in the journal, instead of raising.
        weights: safetensors that hold the weights of a ``model`` on the meta device, built in :func:`without_weights`:
            a file, or a folder with one or with several and their index. They are read block by block, in the dtype of
            the model, and given up when the block is packed: memory holds the result and the float weights of one
            block, and the codes are those of a run with all weights. Layers outside of blocks have their turn too.

    Returns:
        A model of the same class, converted and in evaluation mode unless ``convert=False``.

    Raises:
        TypeError: ``calibration`` is a batch instead of a list of them, or ``options`` is another thing.
        ValueError: the method is unknown, calibration is missing, or the config does not fit the model. With
            ``weights``: the files hold others than the model's, or what was asked for needs all of them at once.
        FileNotFoundError: ``weights`` are not there.
        ParityError: with ``verify``, if the result is not what was fake-quantized.
    """
    original: ModelT = getattr(model, "_orig_mod", model)  # of torch.compile
    plan = _plan_of(original, config)
    chosen = method or method_of(plan)
    check_choice("method", chosen, tuple(METHODS))
    known = prepared_plan(original) is not None
    _check(original, chosen, calibration, options, known=known, verify=verify)
    matched = _matched(original, weights, chosen, options, known=known, verify=verify, convert=convert)
    tasks = preflight(original, plan, chosen)
    (observer := observer or PTQObserver()).started(tasks)
    check_tasks(tasks)
    replica = _replica(original, plan)
    notes = unknown_weights(replica)
    for note in notes:
        logger.warning(note)
    stream = None if matched is None else WeightStream(replica, matched)
    if options is not None and options.equalization is not None:
        calibration = list(calibration or ())
        notes = (*notes, _even_out(replica, calibration, forward, options))
    if not METHODS[chosen].needs_statistics:
        nearest = round_model(
            replica,
            calibration,
            forward,
            observer,
            notes,
            verify=verify,
            convert=convert,
            across_ranks=options is not None and options.across_ranks,
            stream=stream,
        )
        own_parameters(nearest, original)
        return nearest
    batches = [] if calibration is None else list(calibration)
    if not batches:
        raise ValueError(f"method={chosen!r} got no calibration batch; give at least one")
    options = options or PTQOptions()
    kept = None
    if journal is not None and options.across_ranks:
        raise ValueError("journal=... is of one process; leave it out with across_ranks=True")
    if journal is not None:
        settings = {"plan": plan, "method": chosen, "options": options, "convert": convert}
        value_of = None if matched is None else matched.value
        kept = Journal(journal, fingerprint(original, batches, value_of, **settings), restart=restart)
        kept.begin(replica)
        if stream is not None:
            stream.on_read = kept.know
    engine = Engine(
        replica,
        batches,
        chosen,
        options,
        forward=forward,
        observer=observer,
        journal=kept,
        packs=convert and not verify,
        stream=stream,
    )
    report = engine.run()
    report = replace(report, notes=(*notes, *report.notes))
    if stream is not None:
        stream.take([replica])  # what no batch came to and no rule quantizes
    if static_quantizers(replica):  # the ranges of activations are those of the quantized weights
        calibrate(replica, batches, forward, across_ranks=options.across_ranks)
    result = _finished(replica, report, batches, forward, observer, verify=verify, convert=convert)
    own_parameters(result, original)
    return result


def _plan_of(model: nn.Module, config: PlanLike | None) -> QuantizationPlan:
    known = prepared_plan(model)
    return known if config is None and known is not None else resolve_plan("int8" if config is None else config)


def _purpose(method: str) -> str:
    return "look at the inputs of layers" if METHODS[method].needs_statistics else "compare on"


def _replica(model: ModelT, plan: QuantizationPlan) -> ModelT:
    """Return a prepared copy: weights are shared; buffers, which a forward may write, and scales are not."""
    parts = (".weight_quantizer.", ".input_quantizer.")
    shared = {id(p): p for name, p in model.named_parameters() if not any(part in f".{name}" for part in parts)}
    return prepare(copy_model(model, shared).eval(), plan)


def _even_out(
    replica: nn.Module,
    batches: Sequence[Any],
    forward: Callable[[nn.Module, Any], Any] | None,
    options: PTQOptions,
) -> str:
    """Even out the channels of a prepared model, in place, and return what the report says of it."""
    if not batches:
        raise ValueError("equalization=... got no calibration batch; give at least one")
    done = equalize(replica, batches, forward, options.equalization, across_ranks=options.across_ranks)
    readers = {name for group in done for name in group.readers}
    return f"{len(done)} groups of channels, inputs of {len(readers)} layers, were evened out"


def _check(
    original: nn.Module,
    chosen: str,
    calibration: Iterable[Any] | None,
    options: PTQOptions | None,
    *,
    known: bool,
    verify: bool,
) -> None:
    """Raise where :func:`quantize_model` was called with what does not go together."""
    if any(isinstance(module, QuantizedLayer) for module in original.modules()):
        raise ValueError(f"{type(original).__name__} is converted already; give the float model")
    if (known or any(isinstance(module, QATLayer) for module in original.modules())) and (
        not METHODS[chosen].needs_statistics or not known
    ):
        raise ValueError(f"{type(original).__name__} is prepared; call calibrate(model, batches) and convert(model)")
    if calibration is None and (verify or METHODS[chosen].needs_statistics):
        what = f"method={chosen!r}" if METHODS[chosen].needs_statistics else "verify=True"
        raise ValueError(f"{what} needs calibration batches to {_purpose(chosen)}; give calibration=[...]")
    if isinstance(calibration, (Tensor, Mapping)):
        raise TypeError(f"calibration is one {type(calibration).__name__}; give the batches in a list: [calibration]")
    if options is not None and not isinstance(options, PTQOptions):
        raise TypeError(f"options={options!r} is not allowed; use PTQOptions, such as PTQOptions(gptq=GPTQOptions())")
    if options is not None and options.equalization is not None and calibration is None:
        raise ValueError("equalization=... needs calibration batches to look at channels; give calibration=[...]")


def _matched(
    model: nn.Module,
    weights: WeightFiles | str | os.PathLike[str] | None,
    method: str,
    options: PTQOptions | None,
    *,
    known: bool,
    verify: bool,
    convert: bool,
) -> MatchedWeights | None:
    """Return where the weights of ``model`` are; None if it has them.

    Raises:
        ValueError: it has none and no files are given, or something needs all of them at once.
    """
    if weights is None:
        if has_meta_parameters(model):
            raise ValueError(
                f"{type(model).__name__} has parameters on the meta device; say where its weights are with "
                "weights=..., or load them first"
            )
        return None
    one_pass = METHODS[method].needs_statistics and options is not None and options.order == "one_pass"
    evens_out = options is not None and options.equalization is not None
    for asked, why, instead in (
        (evens_out, "equalization=...", "leave it out"),
        (known, "a prepared model", "give the float model"),
        (verify, "verify=True", "leave it out, and check_parity on a part of the model"),
        (not convert, "convert=False", "leave it out: a model that is not packed holds all float weights"),
        (one_pass, "order='one_pass'", "use 'blocks' or 'sublayers'"),
    ):
        if asked:
            raise ValueError(f"{why} needs all weights at once, and weights=... are read block by block; {instead}")
    files = weights if isinstance(weights, WeightFiles) else WeightFiles(weights)
    return files.match(model)


def _finished(
    model: ModelT,
    report: PTQReport,
    batches: Sequence[Any],
    forward: Callable[[nn.Module, Any], Any] | None,
    observer: PTQObserver,
    *,
    verify: bool,
    convert: bool,
) -> ModelT:
    """Convert what is still in float, and tell."""
    result = model
    if convert and any(True for _ in qat_layers(model)):
        result = convert_model(model, verify=batches if verify else None, forward=forward)
    elif convert:
        finish_conversion(model)
    attach_ptq_report(result, report)
    observer.finished(report)
    return result
