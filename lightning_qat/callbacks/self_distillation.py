"""Self-distillation: the fake-quantized model learns from what it is in float."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_qat.callbacks.both_lightnings import in_both, serve_both
from lightning_qat.callbacks.quantization_monitor import _compiled
from lightning_qat.transforms.distillation import (
    DistillationLoss,
    as_teacher,
    distillation_gradient,
    weights_of,
    with_weights,
)
from lightning_qat.transforms.penalty import check_factor
from lightning_qat.transforms.prepare import qat_layers
from lightning_qat.validation import check_choice, nearest_first

#: Which weights the teacher has.
Teacher = Literal["now", "start"]


class SelfDistillation(pl.Callback):
    """Train as if ``weight * distillation loss`` were added to the loss of an unchanged LightningModule.

    The teacher is the float forward of the same latent weights: no second model in memory, no file to load, and it
    gets better as the weights do. It also follows them wherever the student's gradient takes them, the student's error
    with it: where the student cannot be better than its teacher (a pretrained model, few data, no labels),
    ``teacher="start"`` is the better one, at the cost of a copy of the weights.

    Before each forward pass of the module in training the same inputs go through it once more with fake quantization
    switched off and without gradients, with the same dropout; BatchNorm statistics, observers, the random state and
    attributes stay as they were. The gradient of the loss, which is known as soon as the student's output is, joins
    the one that arrives at that output in the backward pass: divided by ``accumulate_grad_batches`` and scaled as that
    is. An output that the loss does not depend on is not distilled.

    One float forward without a graph is what it costs. In a phase of float training nothing is done. Logged is
    ``quantization/distillation_loss``, without ``weight``, summed over the outputs of a batch.

    With manual optimization the loss counts in full for each output, whatever the module divides its own by. Names in
    ``layers`` have to be of modules outside activation checkpointing. In a compiled module dropout draws other numbers
    than in the teacher, which is always run eagerly.

    Args:
        weight: of the distillation loss, 0 or more; 0 measures it and changes no bit of the training.
        temperature: softens the predictions for ``"kl"``; the loss is multiplied by its square.
        layers: names of the modules whose outputs are distilled, such as ``"model"``; None is the LightningModule's
            own ``forward``, which its ``training_step`` has to call as ``self(x)``.
        loss: ``"kl"`` for logits, ``"mse"`` for anything else.
        output: which part of an output that is a dict, a tuple or an object with attributes; None takes a tensor, or
            ``logits``.
        class_dim: dimension of the classes for ``"kl"``; 1 for images ``[N, classes, H, W]``.
        teacher: ``"now"``, the weights as they are, in the mode that they train in; or ``"start"``, those (and the
            buffers) that the fit began with, in evaluation mode. They are kept in checkpoints, so that a run that goes
            on has the same teacher.
        task_weight: what the gradient of the module's own loss is multiplied by where it arrives at the output; 0 lets
            the teacher alone teach.

    Raises:
        ValueError: for settings that are not allowed; in training for names that the module does not have, for
            outputs without such a part, where ``task_weight`` is 0 and nothing is distilled, and with DeepSpeed, which
            scales losses itself.
    """

    def __init__(
        self,
        weight: float = 1.0,
        temperature: float = 1.0,
        layers: str | Sequence[str] | None = None,
        *,
        loss: DistillationLoss = "kl",
        output: str | int | None = None,
        class_dim: int = -1,
        teacher: Teacher = "now",
        task_weight: float = 1.0,
    ) -> None:
        serve_both(SelfDistillation)
        super().__init__()
        self.weight = check_factor("weight", weight)
        self.temperature = check_factor("temperature", temperature)
        if not self.temperature:
            raise ValueError(f"temperature={temperature!r} is not allowed; use a number above 0")
        self.layers = ("",) if layers is None else (layers,) if isinstance(layers, str) else tuple(layers)
        if not self.layers or not all(isinstance(name, str) for name in self.layers):
            raise ValueError(f"layers={layers!r} is not allowed; use names of modules, or None for the whole module")
        self.loss: DistillationLoss = check_choice("loss", loss, ("kl", "mse"))  # type: ignore[assignment]
        self.output = output
        self.class_dim = class_dim
        self.teacher: Teacher = check_choice("teacher", teacher, ("now", "start"))  # type: ignore[assignment]
        self.task_weight = check_factor("task_weight", task_weight)
        #: Of ``teacher="start"``: for each name in ``layers``, the tensors of the module, and whether a checkpoint's.
        self._start: dict[str, dict[str, Tensor]] = {}
        self._restored = False
        self._handles: list[Any] = []
        #: Of forward passes that have begun: the module, and what the teacher said.
        self._said: list[tuple[nn.Module, Tensor]] = []
        self._losses: list[Tensor] = []
        self._quantized = False  # this batch's forward; when the batch has ended the next phase may have begun
        self._warned = False

    def remarks(self) -> list[tuple[str, str]]:
        """Return ``(when, what)``, for ``explain`` of the quantization callbacks."""
        whose = "the same weights" if self.teacher == "now" else "the weights the fit began with"
        task = "" if self.task_weight == 1.0 else f", the loss of the task {self.task_weight:g} times"
        return [("while quantized", f"the float forward of {whose} teaches, {self.weight:g} times {self.loss}{task}")]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if any(isinstance(trainer.strategy, known) for known in in_both("strategies.DeepSpeedStrategy")):
            raise ValueError("SelfDistillation does not know how DeepSpeed scales losses; use DDP")
        modules = dict(pl_module.named_modules())
        for name in self.layers:
            if name not in modules:
                nearest = ", ".join(repr(n) for n in nearest_first(name, modules)[:5])
                raise ValueError(f"layers={name!r}: {type(pl_module).__name__} has no such module; nearest: {nearest}")
        self._remove(pl_module)
        self._warned = False
        self._begin(modules)
        for name in self.layers:
            self._watch(trainer, modules[name], self._start.get(name))
        _forget_graphs(pl_module)

    def _begin(self, modules: dict[str, nn.Module]) -> None:
        """Have the teacher's weights: of the checkpoint that the run goes on from, or as they are."""
        restored, self._restored = self._restored, False
        if self.teacher != "start":
            self._start = {}
        elif not restored:
            self._start = {name: weights_of(modules[name]) for name in self.layers}
        else:
            for name, kept in self._start.items():
                now = weights_of(modules[name])
                if kept.keys() != now.keys():
                    raise ValueError(
                        f"the checkpoint's teacher of layers={name!r} has other parameters than the module; go on with "
                        "the module that it was written from"
                    )
                self._start[name] = {key: tensor.to(now[key]) for key, tensor in kept.items()}

    @property
    def state_key(self) -> str:
        # There may be several of these, also of one output. Without a state nothing is lost by another key.
        more = {"temperature": self.temperature} if self.teacher == "now" else {}
        own = {"teacher": self.teacher, "loss": self.loss, "class_dim": self.class_dim, **more}
        return self._generate_state_key(layers=self.layers, output=self.output, **own)

    def state_dict(self) -> dict[str, Any]:
        return {"start": self._start} if self._start else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if "start" in state_dict:
            if set(state_dict["start"]) != set(self.layers):
                raise ValueError(
                    f"layers={self.layers!r} is not what the checkpoint was trained with: {tuple(state_dict['start'])}"
                )
            self._start, self._restored = dict(state_dict["start"]), True

    def _watch(self, trainer: pl.Trainer, module: nn.Module, start: dict[str, Tensor] | None) -> None:
        # Functions and not methods: a copy of the module then shares them instead of copying this callback.

        @torch.compiler.disable
        def before(called: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if called is module and _trains(trainer, called):
                self._said.append((called, self._ask_teacher(called, args, kwargs, start)))

        @torch.compiler.disable
        def after(called: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self._said and self._said[-1][0] is called and torch.is_grad_enabled():
                self._teach(trainer, _part(output, self.output), self._said.pop()[1])

        self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        self._handles.append(module.register_forward_hook(after, with_kwargs=True))

    def _ask_teacher(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], start: dict[str, Tensor] | None
    ) -> Tensor:
        """Return the output that ``module`` has in float, with the weights ``start`` if there are any."""
        if torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "SelfDistillation: a module of layers= is run again in the backward pass, by activation "
                "checkpointing; name a module outside of it"
            )
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and not leaf.is_inference()]
        versions = [leaf._version for leaf in inputs]
        with as_teacher(module), nullcontext() if start is None else with_weights(module, start):
            # Not ``module(...)``: its own pre-hooks have seen these arguments.
            said = _part(module.forward(*args, **kwargs), self.output)
        if versions != [leaf._version for leaf in inputs]:
            raise RuntimeError(
                f"SelfDistillation: the forward of {type(module).__name__} changes its input in place, and it is to "
                "run twice; clone the input first, or name another module in layers="
            )
        return said.detach()

    def _teach(self, trainer: pl.Trainer, student: Tensor, teacher: Tensor) -> None:
        """Measure the distillation loss, and let its gradient join that of ``student``."""
        loss, gradient = distillation_gradient(student.detach(), teacher, self.loss, self.temperature, self.class_dim)
        self._losses.append(loss)
        if (self.weight or self.task_weight != 1) and student.requires_grad:
            student.register_hook(_joining(trainer, gradient.mul_(self.weight), self.task_weight))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._said.clear()  # of a forward pass that failed
        self._losses.clear()
        self._quantized = False

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self._quantized = self._quantized or _quantizes(pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._losses:
            total = torch.stack([loss.to(self._losses[0]) for loss in self._losses]).sum()
            pl_module.log("quantization/distillation_loss", total)
            self._warned = True  # it is known to be called
        elif not self._warned and self._quantized:
            self._warned = True
            names = ", ".join(repr(name) for name in self.layers if name) or "the LightningModule"
            told = (
                f"SelfDistillation: training_step called no forward of {names}, so nothing is distilled; name the "
                "module that it calls, such as layers='model'"
            )
            if self.task_weight == 0 and outputs:  # a loss: what was to be left out would be all that trains
                raise ValueError(f"{told}. With task_weight=0 the task's own loss would train instead")
            rank_zero_warn(told)
        self._losses.clear()

    def _remove(self, module: pl.LightningModule) -> None:
        if self._handles:
            _forget_graphs(module)
        while self._handles:
            self._handles.pop().remove()
        self._said.clear()
        self._losses.clear()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._remove(pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._remove(pl_module)


serve_both(SelfDistillation)  # LightningCLI looks at the class before there is an instance


def _forget_graphs(module: pl.LightningModule) -> None:
    """Let a compiled ``module`` be compiled anew: its graphs have the hooks of when they were made, unguarded."""
    if _compiled(module):
        torch.compiler.reset()


def _quantizes(module: nn.Module) -> bool:
    return any(layer.weight_quantizer.quantizing for _, layer in qat_layers(module))


def _trains(trainer: pl.Trainer, module: nn.Module) -> bool:
    """Whether a forward pass of ``module`` now is one of quantized training."""
    if not (trainer.training and torch.is_grad_enabled() and _quantizes(trainer.lightning_module)):
        return False
    # Of strategies that wrap the module, such as DDP, ``forward`` stands for ``training_step``, which is called soon.
    return "_ForwardRedirection" not in getattr(module.forward, "__qualname__", "")


def _part(output: Any, which: str | int | None) -> Tensor:
    """Return the tensor of a forward's output that is distilled."""
    found = output
    if which is None and not isinstance(output, Tensor):
        which = "logits"
    if isinstance(which, int) or (isinstance(which, str) and isinstance(output, Mapping)):
        known = range(-len(output), len(output)) if isinstance(output, Sequence) else output
        found = output[which] if which in known else None
    elif isinstance(which, str):
        found = getattr(output, which, None)
    if isinstance(found, Tensor) and found.is_floating_point():
        return found
    names = f" with {', '.join(map(repr, output))}" if isinstance(output, Mapping) else ""
    raise ValueError(
        f"SelfDistillation: a forward returned a {type(output).__name__}{names}, of which output={which!r} is no "
        "floating-point tensor; say which part with output=, an index or a name"
    )


def _joining(trainer: pl.Trainer, gradient: Tensor, factor: float) -> Callable[[Tensor], Tensor | None]:
    """Return a hook that adds ``gradient`` to ``factor`` times what is there, once, scaled as that loss is."""
    pending = [gradient]

    def hook(grad: Tensor) -> Tensor | None:
        if torch.is_grad_enabled() or not pending:  # a gradient that is to be differentiated, such as of a penalty
            return None
        added = pending.pop()
        if trainer.lightning_module.automatic_optimization:
            added = added / trainer.accumulate_grad_batches
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        own = grad if factor == 1 else grad * factor
        return own + (added if scaler is None else scaler.scale(added)).to(grad.dtype)

    return hook
