"""What the parity gate found, and how it goes along with a converted model: in memory and as ``certificate.json``."""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor, nn

from lightning_qat.transforms.unobserved import float_rules

logger = logging.getLogger(__name__)

CERTIFICATE = "certificate.json"
_VERSION = 1
#: Where a converted model keeps its report and the fingerprint of the tensors it was made of.
_KEPT = "_parity_report"
#: Where a trained model keeps what was found when a copy of it was converted at the end of its fit.
_OF_THE_FIT = "_fit_parity_report"


@dataclass(frozen=True, kw_only=True)
class LayerParity:
    """One converted layer against the trained one, both given the trained layer's input.

    Args:
        name: of the layer.
        sqnr_db: of the converted layer's output; None where no batch reached the layer.
        threshold_db: what it has to reach.
        changed: weights and input ranges that are not the trained layer's own, whatever the outputs say.
        calls: how often the layer was compared.
        read_by: the function that multiplies the layer's weight without calling the layer; "" for most.
    """

    name: str
    sqnr_db: float | None
    threshold_db: float
    changed: int = 0
    calls: int = 1
    read_by: str = ""

    @property
    def passed(self) -> bool:
        """Whether the layer is what trained, as far as it was compared."""
        return not (self.changed or self.read_by) and (self.sqnr_db is None or self.sqnr_db >= self.threshold_db)


@dataclass(frozen=True, kw_only=True)
class MetricParity:
    """A metric of both models on the same batches; ``tolerance`` None only reports it."""

    name: str
    trained: float
    converted: float
    tolerance: float | None = None

    @property
    def difference(self) -> float:
        """Converted minus trained."""
        return self.converted - self.trained

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance."""
        return self.tolerance is None or abs(self.difference) <= self.tolerance


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """How far a converted model is from the one that trained.

    Args:
        layers: in forward order; those that no batch reached come last.
        changed_tensors: of what stays in float, the names that are not the trained model's own.
        output_sqnr_db: of the whole model's outputs; None where they cannot be compared.
        output_threshold_db: what that has to reach; None only reports it.
        agreement: share of outputs ``[N, ..., classes]`` with the same top-1; None where there are none.
        metrics: that were measured with both models.
        batches: how many were run.
        device: they ran on.
        date: of the check, UTC.
        library: version of this library.
        torch: version of PyTorch.
    """

    layers: tuple[LayerParity, ...]
    changed_tensors: tuple[str, ...] = ()
    output_sqnr_db: float | None = None
    output_threshold_db: float | None = None
    agreement: float | None = None
    metrics: tuple[MetricParity, ...] = ()
    batches: int = 0
    device: str = ""
    date: str = ""
    library: str = ""
    torch: str = ""

    @property
    def unchecked(self) -> tuple[str, ...]:
        """Names of the layers that no batch reached."""
        return tuple(layer.name for layer in self.layers if layer.sqnr_db is None)

    @property
    def worst_layer(self) -> LayerParity | None:
        """The compared layer with the least SQNR."""
        compared = [layer for layer in self.layers if layer.sqnr_db is not None]
        return min(compared, key=lambda layer: _order(layer.sqnr_db), default=None)

    @property
    def first_divergence(self) -> LayerParity | None:
        """The first layer, in forward order, that is not what trained."""
        return next((layer for layer in self.layers if not layer.passed), None)

    @property
    def passed(self) -> bool:
        """Whether the converted model is what trained."""
        return self.failure() is None

    def failure(self) -> str | None:
        """Return in a sentence what is not as it trained and what to do, or None."""
        read = {layer.name: layer for layer in self.layers if layer.read_by}
        layer = self.first_divergence
        if read:
            others = {layer.name for layer in self.layers if not layer.read_by}
            return _read_failure(list(read), next(iter(read.values())), others)
        if layer is not None:
            return _layer_failure(layer)
        if self.changed_tensors:
            return f"the float tensor {self.changed_tensors[0]!r} is not the trained model's own; convert again"
        least, found = self.output_threshold_db, self.output_sqnr_db
        if least is not None and found is not None and not found >= least:
            return (
                f"every layer is what trained, but the outputs are at {found:.1f} dB and output_threshold={least:g} "
                "dB; look at what the forward computes between layers"
            )
        metric = next((metric for metric in self.metrics if not metric.passed), None)
        if metric is None:
            return None
        return (
            f"every layer is what trained, but {metric.name} is {metric.converted:.6g} and was {metric.trained:.6g} "
            f"(tolerance {metric.tolerance:g}); check on more batches, or allow more"
        )

    def raise_if_failed(self) -> None:
        """Raise :class:`ParityError` unless the converted model is what trained."""
        if not self.passed:
            raise ParityError(self)

    def with_metrics(
        self,
        trained: Mapping[str, float],
        converted: Mapping[str, float],
        tolerances: Mapping[str, float] | None = None,
    ) -> ParityReport:
        """Return the report with the metrics that both models have; those in ``tolerances`` must not differ by more."""
        allowed = tolerances or {}
        found = tuple(
            MetricParity(name=name, trained=value, converted=converted[name], tolerance=allowed.get(name))
            for name, value in trained.items()
            if name in converted
        )
        return replace(self, metrics=found)

    def summary(self) -> str:
        """Return the report in one line."""
        worst = self.worst_layer
        compared = len(self.layers) - len(self.unchecked)
        parts = [f"{compared} layers" + (f" ({len(self.unchecked)} not reached)" if self.unchecked else "")]
        if worst is not None:
            parts.append(f"worst {worst.name!r} {worst.sqnr_db:.1f} dB (needs {worst.threshold_db:g})")
        if self.output_sqnr_db is not None:
            parts.append(f"outputs {self.output_sqnr_db:.1f} dB")
        if self.agreement is not None:
            parts.append(f"same top-1 {100 * self.agreement:.2f} %")
        parts += [f"{metric.name} {metric.difference:+.4g}" for metric in self.metrics]
        return f"{'verified' if self.passed else 'FAILED'} {self.date}: {', '.join(parts)}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; numbers that JSON does not have become ``"inf"``, ``"-inf"`` and ``"nan"``."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> ParityReport:
        """Return the report that :meth:`to_dict` made.

        Raises:
            KeyError, TypeError, ValueError: it is not one.
        """
        fields = dict(content)
        fields["layers"] = tuple(_numbers(LayerParity, entry) for entry in content["layers"])
        fields["metrics"] = tuple(_numbers(MetricParity, entry) for entry in content["metrics"])
        fields["changed_tensors"] = tuple(content["changed_tensors"])
        for name in ("output_sqnr_db", "output_threshold_db", "agreement"):
            fields[name] = None if content[name] is None else float(content[name])
        return cls(**fields)


class ParityError(ValueError):
    """A converted model is not what trained; ``report`` says where and how far."""

    def __init__(self, report: ParityReport) -> None:
        super().__init__(f"the converted model is not the trained one: {report.failure()}")
        self.report = report

    def __reduce__(self) -> Any:
        return type(self), (self.report,)


def _read_failure(read: list[str], layer: LayerParity, others: set[str]) -> str:
    also = f" (and of {len(read) - 1} more)" if len(read) > 1 else ""
    return (
        f"the weight of layer {layer.name!r}{also} is read by code that does not call the layer ({layer.read_by}), "
        f"where it trained in float; leave {'them' if also else 'it'} in float with {float_rules(read, others)}"
    )


def _layer_failure(layer: LayerParity) -> str:
    facts = []
    if layer.sqnr_db is not None:
        facts.append(
            f"from the same input its output is at {layer.sqnr_db:.1f} dB, threshold {layer.threshold_db:g} dB"
        )
    if layer.changed:
        facts.append(f"{layer.changed} of its weights and input ranges differ")
    if layer.changed:
        way = "convert the model again as it is now"
    else:
        way = f"leave the layer in float with LayerRule({layer.name!r}), or allow more with layer_threshold=..."
    return f"layer {layer.name!r} is the first that diverges: {' and '.join(facts)}; {way}"


def _order(value: float | None) -> float:
    return -math.inf if value is None or math.isnan(value) else value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(kind: Any, entry: Mapping[str, Any]) -> Any:
    """Return a ``kind`` from ``entry``, whose numbers may be strings."""
    exact = ("name", "changed", "calls", "read_by")
    return kind(**{key: v if key in exact or v is None else float(v) for key, v in entry.items()})


def fingerprint_of(model: nn.Module) -> str:
    """Return a hash of the tensors of ``model``, the same on every device."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            continue
        plain = value.detach().cpu().contiguous()
        digest.update(f"{name} {plain.dtype} {tuple(plain.shape)};".encode())
        size = plain.numel() * plain.element_size()
        if size:
            digest.update((ctypes.c_char * size).from_address(plain.data_ptr()))
    return digest.hexdigest()


def attach_report(converted: nn.Module, report: ParityReport) -> None:
    """Keep ``report`` on the model that it is about, so that saving writes it as the certificate."""
    model = getattr(converted, "_orig_mod", converted)
    model.__dict__[_KEPT] = (report, fingerprint_of(model))


def keep_fit_report(trained: nn.Module, report: ParityReport, fingerprint: str) -> None:
    """Keep on ``trained`` what was found of a converted copy with ``fingerprint``."""
    trained.__dict__[_OF_THE_FIT] = (report, fingerprint)


def inherit_fit_report(trained: nn.Module, converted: nn.Module) -> None:
    """Give ``converted`` the report that was made when the fit of ``trained`` ended, if its tensors are the same."""
    converted.__dict__.pop(_OF_THE_FIT, None)  # it is a copy
    report, fingerprint = trained.__dict__.get(_OF_THE_FIT, (None, ""))
    if report is not None and fingerprint_of(converted) == fingerprint:
        attach_report(converted, report)


def forget_reports(model: nn.Module) -> None:
    """Take the reports off a copy that is another model now."""
    for kept in (_KEPT, _OF_THE_FIT):
        model.__dict__.pop(kept, None)


def parity_report(converted: nn.Module) -> ParityReport | None:
    """Return the report that a converted model carries, or None."""
    model = getattr(converted, "_orig_mod", converted)
    return model.__dict__.get(_KEPT, (None, ""))[0]


def report_to_save(converted: nn.Module) -> ParityReport | None:
    """Return the report of a model that still is the one it was made of, or None."""
    report, fingerprint = converted.__dict__.get(_KEPT, (None, ""))
    if report is not None and fingerprint != fingerprint_of(converted):
        logger.warning("the model was changed after it was verified: it is saved without %s", CERTIFICATE)
        return None
    return report


def certificate_text(report: ParityReport, sha256: str) -> str:
    """Return ``certificate.json``: the report, and the hash of the tensors that it is about."""
    content = {"version": _VERSION, "sha256": sha256, "passed": report.passed, "report": report.to_dict()}
    return json.dumps(content, indent=1, allow_nan=False)


def report_of(text: str, sha256: str) -> ParityReport:
    """Return the report in a certificate about tensors of the hash ``sha256``.

    Raises:
        ValueError: it is damaged, or about other tensors.
    """
    try:
        content = json.loads(text)
        version, about, report = content["version"], content["sha256"], ParityReport.from_dict(content["report"])
    except (json.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"it is damaged ({type(error).__name__}: {error})") from None
    if version != _VERSION:
        raise ValueError(f"it has version {version!r}; this library reads {_VERSION}")
    if about != sha256:
        raise ValueError("it certifies other tensors than those in the folder")
    return report
