"""The layer-wise engine: one block after the other is looked at, quantized, run and packed.

What is held at once is the model, the statistics of one block, and what is between two blocks for each batch. A block
that is done gives up its float weights before the next one begins.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_qat.nn import QATLayer
from lightning_qat.nn.computed_weight import weight_now
from lightning_qat.ptq.adopt import adopt, nearest_codes, own_packed_weights, problem_of
from lightning_qat.ptq.block_scaling import BlockScaling, scale_block
from lightning_qat.ptq.blocks import Block, Course, Segment, SegmentRunner, find_blocks, stopping_at, watch_course
from lightning_qat.ptq.channels import shared_parameters
from lightning_qat.ptq.chosen import ChosenCodes
from lightning_qat.ptq.folding import Fold
from lightning_qat.ptq.freed_memory import return_freed_memory
from lightning_qat.ptq.journal import Journal
from lightning_qat.ptq.methods import METHODS, PTQOptions, choose_codes, reason_for_nearest
from lightning_qat.ptq.nearest import choose_nearest
from lightning_qat.ptq.outcome import LayerOutcome, PTQObserver, PTQReport, Stopwatch, most_memory
from lightning_qat.ptq.reached import refuse_unreached
from lightning_qat.ptq.statistics import InputStatistics
from lightning_qat.ptq.streaming import WeightStream
from lightning_qat.ptq.watch import (
    Run,
    SharedInput,
    agreed,
    find_shared_inputs,
    gather_statistics,
    of_every_rank,
    run_until_reached,
)
from lightning_qat.transforms.calibrate import _call, calibrating
from lightning_qat.transforms.calibrated_mode import as_calibrated
from lightning_qat.transforms.convert import convert_layers
from lightning_qat.transforms.fuse import decide_no_folding, watch_folds
from lightning_qat.transforms.padding import Padding
from lightning_qat.transforms.phase import float_forward
from lightning_qat.transforms.prepare import qat_layers
from lightning_qat.transforms.ranges import static_quantizers
from lightning_qat.transforms.readers import watch_readers

#: Runs every batch through the part of the model that a stage is.
Runs = Callable[[], Iterable[Run]]


@dataclass(frozen=True, eq=False)
class _Stage:
    """What is quantized as one.

    Args:
        name: of the block, or what is outside of blocks.
        layers: names.
        runs: run the batches through it; a layer outside is reached through the whole model.
        parts: the order of ``"sublayers"`` is worth its passes.
        module: what ``runs`` call and returns their output; None where they stop before its end.
    """

    name: str
    layers: tuple[str, ...]
    runs: Runs
    parts: bool
    module: nn.Module | None


class Engine:
    """Quantizes a prepared model in place.

    Args:
        model: prepared; its parameters may be another model's, they are replaced and not written to.
        batches: of calibration; kept while this runs.
        method: a name of ``METHODS``.
        options: how.
        forward: called as ``forward(model, batch)``; None calls the model with the batch.
        observer: is told.
        journal: where finished blocks are kept; None keeps none.
        packs: convert a block as soon as it is done.
        stream: reads the weights of ``model``, which it does not have; then blocks are always packed.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Any],
        method: str,
        options: PTQOptions,
        *,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        observer: PTQObserver | None = None,
        journal: Journal | None = None,
        packs: bool = True,
        stream: WeightStream | None = None,
    ) -> None:
        self.model, self.batches = model, list(batches)
        self.method, self.options, self.way = method, options, METHODS[method]
        self.observer = observer or PTQObserver()
        self.journal = journal
        self._padding = Padding(model, forward or _call)
        self._layers: dict[str, QATLayer] = dict(qat_layers(model))
        self._stream = stream
        # Activations that get their ranges from the finished model keep every layer in float until then.
        ranges = bool(static_quantizers(model))
        self._packs = packs and (stream is not None or not ranges)
        self._holds_inputs = stream is not None and ranges
        if self._holds_inputs and options.across_ranks:
            raise ValueError(
                "ranges of activations are calibrated block by block with weights=..., and not across ranks; use a "
                "config with dynamic ranges, such as 'int8_dynamic', or one rank"
            )
        self._modules = dict(model.named_modules())
        self._outcomes: list[LayerOutcome] = []
        self._done = 0
        self._untouchable = shared_parameters(model)
        self._like: tuple[Fold, ...] = ()
        self._scaling_notes: dict[str, str] = {}
        self._watch = Stopwatch()

    @torch.no_grad()
    def run(self) -> PTQReport:
        """Quantize every layer and return what came out."""
        blocks = find_blocks(self.model, self._layers)
        with (
            float_forward(self.model),
            as_calibrated(self.model),
            torch.compiler.set_stance("force_eager"),
            self._lending(blocks),
        ):
            self._decide_folds()
            self._padding.look_at(self.batches, across_ranks=self.options.across_ranks)
            course = watch_course(self.model, self._layers, blocks, self._run_of(self.batches[0]))
            if self.options.order == "one_pass" and course.segments and self.way.scaling is not None:
                raise ValueError(
                    f"order='one_pass' is not available with method={self.method!r}, which scales one block after the "
                    "other; use 'blocks' or 'sublayers'"
                )
            if self._stream is not None and not course.segments:
                raise ValueError(
                    f"{type(self.model).__name__} has no blocks of which one follows the other, so that all of its "
                    "weights would be in memory at once; load them, and leave weights=... out"
                )
            if self.options.across_ranks:
                self._check_same_course(course)
            elif self._stream is None:
                refuse_unreached(self._layers, course.unreached, map(self._run_of, self.batches[1:]))
            if self.options.order == "one_pass" or not course.segments:
                self._quantize_at_once()
            else:
                self._quantize_in_turn(course)
        order = self.options.order if course.segments else "one_pass"
        notes = self._padding.notes
        return PTQReport(self.method, order, tuple(self._outcomes), notes, self._watch.seconds())

    def _check_same_course(self, course: Course) -> None:
        """Raise ``ValueError`` on all ranks where they would wait for each other in different stages."""
        stages = [[block.name for block in segment.blocks] for segment in course.segments]
        if self.options.order == "one_pass" or not any(of_every_rank(bool(stages))):
            return
        ranks = of_every_rank((stages, course.outside, course.unreached))
        if any(rank != ranks[0] for rank in ranks):
            raise ValueError(
                "the first calibration batches of the ranks run different layers; give all ranks batches that reach "
                "the same ones, or use order='one_pass' with a method that scales nothing, such as 'gptq'"
            )

    # --- the order ---------------------------------------------------------------------------------

    def _quantize_at_once(self) -> None:
        """Look at all layers in one pass of the float model."""
        names = tuple(self._layers)
        self._quantize(_Stage("model", names, self._runs, False, self.model), 1)
        self._pack(names)

    def _quantize_in_turn(self, course: Course) -> None:
        stages = sum(len(segment.blocks) for segment in course.segments)
        stages += sum(map(bool, (*course.outside, course.unreached)))
        for segment, before in zip(course.segments, course.outside, strict=False):
            self._quantize_outside(before, segment.blocks[0].name, stages)
            self._quantize_segment(segment, stages)
            return_freed_memory()  # of what was between its blocks
        self._quantize_outside(course.outside[-1], None, stages)
        if course.unreached:  # by the first batch, which is all that was watched
            late = _Stage("what the first batch did not reach", course.unreached, self._runs, False, None)
            self._take(*course.unreached)
            self._quantize(late, stages)
            self._observe(late)
            self._pack(course.unreached)

    def _quantize_outside(self, names: tuple[str, ...], until: str | None, stages: int) -> None:
        if not names:
            return
        where = "after the blocks" if until is None else f"before {until}"
        with stopping_at(None if until is None else self._modules[until]):
            whole = self.model if until is None else None
            self._take(*names)
            stage = _Stage(where, names, self._runs, False, whole)
            self._quantize(stage, stages)
            self._observe(stage)
        self._pack(names)

    def _quantize_segment(self, segment: Segment, stages: int) -> None:
        self._take(segment.blocks[0].name)
        runner = SegmentRunner(segment, self._runs(), self._padding)
        last = segment.blocks[-1]
        for block in segment.blocks:
            parts = self.options.order == "sublayers"
            self._take(block.name)
            if block.layers:
                own_packed_weights(block.module)
                stage = _Stage(block.name, block.layers, runner.runs, parts, block.module)
                self._quantize(stage, stages)
                self._observe(stage)
            if block is not last:
                runner.advance()
            self._pack(block.layers)

    # --- one stage ---------------------------------------------------------------------------------

    def _quantize(self, stage: _Stage, stages: int) -> None:
        self._done += 1
        self.observer.stage_started(stage.name, self._done, stages)
        restored = self.journal.restore(stage.name, self.model) if self.journal is not None else None
        if restored is not None:
            self._outcomes += restored
            self.observer.stage_restored(stage.name, restored)
            return
        before = len(self._outcomes)
        layers = {name: self._layers[name] for name in stage.layers}
        runs = iter(stage.runs())
        tried = [next(runs)]  # and those that it takes to come to all layers
        chosen = {name: layer for name, layer in layers.items() if not self._why_nearest(name)}
        shared = find_shared_inputs(chosen, tried[0], _noting(runs, tried))
        if self.options.across_ranks:
            shared = agreed(shared)
        self._choose_all(stage, shared, tried)
        for name in stage.layers:  # the block was reached, and the layer in it was not
            if not any(outcome.name == name for outcome in self._outcomes[before:]):
                note = self._why_nearest(name) or "no calibration batch reached it"
                self._settle(name, nearest_codes(layers[name]), "rtn", Stopwatch(), (note,))
        if self.journal is not None:
            self.journal.write(stage.name, self.model, stage.layers, self._outcomes[before:])

    def _why_nearest(self, name: str) -> str:
        layer = self._layers[name]
        return reason_for_nearest(layer, layer.weight_quantizer.format, self.method)

    def _choose_all(self, stage: _Stage, shared: list[SharedInput], tried: list[Run]) -> None:
        layers = {name: self._layers[name] for name in stage.layers}
        across, padding = self.options.across_ranks, self._padding
        gather = partial(gather_statistics, layers, runs=stage.runs, across_ranks=across, padding=padding)
        scales: dict[str, Tensor] = {}
        known: dict[str, InputStatistics] | None = None
        if self.way.scaling is not None and stage.module is not None:
            scaled = self._scale(stage, layers, shared, gather(shared, stop=True), tried)
            known = dict(scaled.statistics)
            self._scaling_notes = scaled.notes
            scales = {n: g.scales for g in scaled.groups if g.scales is not None for n in g.fold.layers}
        for index, part in enumerate([[each] for each in shared] if stage.parts else [shared]):
            # What the first layers of a scaled block get is known; what follows them gets outputs of quantized ones.
            first = known if index == 0 else None
            statistics = gather(part, stop=True) if first is None else first
            return_freed_memory()  # of summing them up, before it is taken again to choose codes
            self._choose(part, statistics, scales)
        self._scaling_notes = {}

    def _scale(
        self,
        stage: _Stage,
        layers: dict[str, QATLayer],
        shared: list[SharedInput],
        seen: dict[str, InputStatistics],
        tried: list[Run],
    ) -> BlockScaling:
        scaling: Any = self.way.scaling
        found = scale_block(
            stage.module,  # type: ignore[arg-type]
            layers,
            [each.layers for each in shared],
            seen,
            tried[0],
            scaling(self.options),
            untouchable=self._untouchable if self._stream is None else self._stream.also(self._untouchable),
            like=self._like,
            others=tried[1:],
            across_ranks=self.options.across_ranks,
        )
        self._like = found.folds
        return found

    def _choose(
        self, part: list[SharedInput], statistics: dict[str, InputStatistics], scales: dict[str, Tensor]
    ) -> None:
        for each in part:
            for name in each.layers:
                layer, watch = self._layers[name], Stopwatch()
                if name not in statistics:
                    self._settle(name, nearest_codes(layer), "rtn", watch, ("it got no input",))
                    continue
                problem = problem_of(layer, statistics[name])
                chosen = choose_codes(layer, problem, self.way, self.options)
                if name in scales:  # what it would lose if neither its columns were scaled nor its codes chosen
                    scale = scales[name]
                    gram = problem.statistics.gram * scale * scale.unsqueeze(1)
                    plain = choose_nearest(problem.weight / scale, gram, problem.fmt)
                    chosen = replace(chosen, nearest_loss=plain.loss)
                note = self._scaling_notes.get(name)
                self._settle(name, chosen, self.method, watch, () if note is None else (note,))

    def _settle(
        self, name: str, chosen: ChosenCodes, method: str, watch: Stopwatch, notes: tuple[str, ...] = ()
    ) -> None:
        layer = self._layers[name]
        moved = adopt(name, layer, chosen)
        if moved:
            dtype = str(weight_now(layer).dtype).removeprefix("torch.")
            notes = (*notes, f"{moved} codes became their neighbours, of which {dtype} does not tell them")
        known = chosen.loss == chosen.loss
        outcome = LayerOutcome(
            name,
            method,
            chosen.format.bits,
            layer.weight.numel(),
            chosen.loss if known else None,
            chosen.nearest_loss if known and chosen.nearest_loss == chosen.nearest_loss else None,
            chosen.damping,
            (*notes, *chosen.notes),
            watch.seconds(),
            most_memory(),
        )
        self._outcomes.append(outcome)
        self.observer.layer_done(outcome)

    def _pack(self, names: Sequence[str]) -> None:
        """Give up the float weights of layers that are done."""
        if self._stream is not None:
            self._take(*(norm for name in names if (norm := self._layers[name].weight_quantizer.folded_norm)))
        if self._packs:
            convert_layers(self.model, [(name, self._layers[name]) for name in names])
        if self._stream is not None and self._holds_inputs:
            self._stream.hold_inputs(self._modules[name] for name in names)
        return_freed_memory()

    # --- weights that are in files ------------------------------------------------------------------

    def _lending(self, blocks: Sequence[Block]) -> contextlib.AbstractContextManager[None]:
        """Let the parts that are not quantized yet have their weights while they run."""
        if self._stream is None:
            return contextlib.nullcontext()
        return self._stream.lending([block.module for block in blocks])

    def _take(self, *names: str) -> None:
        """Let these modules have their weights from now on."""
        if self._stream is not None:
            self._stream.take(self._modules[name] for name in names)

    def _observe(self, stage: _Stage) -> None:
        """Let inputs have their ranges before the layers are packed; of a model with weights, all have them at last."""
        layers = nn.ModuleList(self._layers[name] for name in stage.layers)
        if self._stream is not None and static_quantizers(layers):
            with calibrating(layers), self._padding.left_out():
                for run in stage.runs():
                    run_until_reached(run)

    # --- running -----------------------------------------------------------------------------------

    def _run_of(self, batch: Any) -> Run:
        return partial(self._padding.run, batch)

    def _runs(self) -> Iterator[Run]:
        return map(self._run_of, self.batches)

    def _decide_folds(self) -> None:
        """Decide from one forward which BatchNorm a layer takes in and who reads its output."""
        if any(isinstance(module, _BatchNorm) for module in self.model.modules()) or static_quantizers(self.model):
            with watch_readers(self.model), watch_folds(self.model):
                self._run_of(self.batches[0])()
        decide_no_folding(self.model)


def _noting(runs: Iterable[Run], noted: list[Run]) -> Iterator[Run]:
    for run in runs:
        noted.append(run)
        yield run
