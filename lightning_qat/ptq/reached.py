"""Layers whose inputs need a range and that no calibration batch comes to: found before anything is done."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from lightning_qat.nn import QATLayer
from lightning_qat.ptq.watch import Run
from lightning_qat.transforms.unobserved import unobserved


def refuse_unreached(layers: Mapping[str, QATLayer], missed: Collection[str], runs: Iterable[Run]) -> None:
    """Raise where one of ``missed`` has a calibrated input and ``runs``, of the batches that are left, miss it too.

    Raises:
        ValueError: naming the layers and the rules that leave them in float.
    """
    inputs = {name: layers[name].input_quantizer for name in missed}
    left = {name for name, quantizer in inputs.items() if quantizer is not None and quantizer.observer is not None}
    handles = [
        layers[name].register_forward_pre_hook(lambda *_, name=name: left.discard(name)) for name in sorted(left)
    ]
    try:
        for run in runs:
            if not left:
                break
            run()
    finally:
        for handle in handles:
            handle.remove()
    if left:
        raise unobserved([name for name in layers if name in left], layers)
