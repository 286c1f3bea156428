"""What other libraries make of the same float model, measured where they are installed."""

from __future__ import annotations

import copy
import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.formats.export import export
from lightning_qat.metrics import sqnr
from lightning_qat.transforms import calibrate, convert, prepare

#: A forward pass without gradients.
Run = Callable[[Tensor], Tensor]

#: Below this against float a peer does not compute the model, and its speed means nothing.
_LEAST_SQNR = 15.0


@dataclass(frozen=True)
class Peer:
    """Another library's form of a model.

    Args:
        name: in the table.
        build: makes it of a float model in evaluation mode, which it may change, and of samples of its input.
        packages: that have to be installed, besides PyTorch.
        bits: that a weight takes where it is stored, scales counted; None is the float model's own.
    """

    name: str
    build: Callable[[nn.Module, Tensor], Run]
    packages: tuple[str, ...] = ()
    bits: float | None = None

    @property
    def installed(self) -> bool:
        """Whether all of its packages are there."""
        return all(importlib.util.find_spec(package) is not None for package in self.packages)


@dataclass(frozen=True)
class Form:
    """A form of a model that was verified, with the SQNR of its outputs against float's, in dB."""

    run: Run
    sqnr_db: float | None = None


def forward_of(model: nn.Module) -> Run:
    """Return the forward pass of ``model`` in inference mode."""

    @torch.inference_mode()
    def run(x: Tensor) -> Tensor:
        output: Tensor = model(x)
        return output

    return run


def working_peers(peers: tuple[Peer, ...], model: nn.Module, samples: Tensor) -> tuple[dict[str, Form], list[str]]:
    """Return the installed peers that compute ``model``, and why each other one is not timed."""
    expected = forward_of(model)(samples)
    found, notes = {}, []
    for peer in peers:
        if not peer.installed:
            continue
        try:
            with silenced():
                run = peer.build(copy.deepcopy(model), samples)
                sqnr_db = float(sqnr(expected, run(samples)))
        except Exception as error:  # noqa: BLE001 - another library fails in any way it likes; the table says how
            notes.append(f"{peer.name} is not timed: {told(error)}")
            continue
        if sqnr_db >= _LEAST_SQNR:
            found[peer.name] = Form(run, sqnr_db)
        else:
            notes.append(f"{peer.name} is not timed: its outputs are {sqnr_db:.1f} dB from float's")
    return found, notes


@contextmanager
def silenced() -> Iterator[None]:
    """Hold back what peers announce of themselves, such as their end, or that torchvision is not there."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def told(error: Exception) -> str:
    """Return the type and the first line of what ``error`` says."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _torch_ao_dynamic(model: nn.Module, samples: Tensor) -> Run:
    return forward_of(torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8))


def _torch_ao_fx(model: nn.Module, samples: Tensor) -> Run:
    from torch.ao import quantization as ao
    from torch.ao.quantization import quantize_fx

    observed = quantize_fx.prepare_fx(model, ao.get_default_qconfig_mapping("x86"), (samples,))
    observed(samples)
    return forward_of(quantize_fx.convert_fx(observed))


def _torchao_dynamic(model: nn.Module, samples: Tensor) -> Run:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return forward_of(model)


def _torchao_int4(model: nn.Module, samples: Tensor) -> Run:
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    quantize_(model, Int4WeightOnlyConfig(group_size=128))
    return forward_of(model)


def _torch_compile(model: nn.Module, samples: Tensor) -> Run:
    return forward_of(torch.compile(model))  # type: ignore[arg-type]


def _bitsandbytes_nf4(model: nn.Module, samples: Tensor) -> Run:
    from bitsandbytes.nn import Linear4bit

    return _bitsandbytes(model, lambda n, k, bias: Linear4bit(k, n, bias, samples.dtype, quant_type="nf4"))


def _bitsandbytes_int8(model: nn.Module, samples: Tensor) -> Run:
    from bitsandbytes.nn import Linear8bitLt

    return _bitsandbytes(model, lambda n, k, bias: Linear8bitLt(k, n, bias, has_fp16_weights=False, threshold=6.0))


def _bitsandbytes(model: nn.Module, make: Callable[[int, int, bool], nn.Module]) -> Run:
    """Return the one Linear of ``model`` in a class of bitsandbytes, which quantizes as it goes to the device."""
    layer: Any
    (layer,) = model.children()
    made = make(layer.out_features, layer.in_features, layer.bias is not None)
    made.load_state_dict(layer.state_dict())
    return forward_of(made.to(layer.weight.device).eval())


def _onnxruntime_float(model: nn.Module, samples: Tensor) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        return _session(_exported(model, samples, Path(folder)))


def _onnxruntime_dynamic(model: nn.Module, samples: Tensor) -> Run:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        source, target = _preprocessed(model, samples, Path(folder)), Path(folder) / "int8.onnx"
        quantize_dynamic(source, target, per_channel=True, weight_type=QuantType.QInt8)
        return _session(target)


def _onnxruntime_static(model: nn.Module, samples: Tensor) -> Run:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Samples(CalibrationDataReader):
        def __init__(self, name: str) -> None:
            self.batches: Iterator[dict[str, Any]] = iter([{name: samples.numpy()}])

        def get_next(self) -> dict[str, Any] | None:
            return next(self.batches, None)

    with tempfile.TemporaryDirectory() as folder:
        source, target = _preprocessed(model, samples, Path(folder)), Path(folder) / "int8.onnx"
        kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        quantize_static(source, target, Samples("x"), quant_format=QuantFormat.QDQ, per_channel=True, **kinds)
        return _session(target)


def _ours_in_onnxruntime(model: nn.Module, samples: Tensor) -> Run:
    prepared = prepare(copy.deepcopy(model), "int8")
    calibrate(prepared, [samples])
    return _our_session(convert(prepared.eval()), samples)


def _ours_weight_only(model: nn.Module, samples: Tensor) -> Run:
    return _our_session(convert(prepare(copy.deepcopy(model), "w4a16")), samples)


def _ours_with_float_inputs(model: nn.Module, samples: Tensor) -> Run:
    return _our_session(convert(prepare(copy.deepcopy(model), "w4a16")), samples, accuracy_level=1)


def _our_session(converted: nn.Module, samples: Tensor, accuracy_level: int | None = None) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        path = export(converted, Path(folder) / "ours.onnx", "onnx", example=samples)
        return _session(path, accuracy_level)


def _exported(model: nn.Module, samples: Tensor, folder: Path) -> Path:
    path = folder / "float.onnx"
    torch.onnx.export(
        model,
        (samples,),
        path,
        input_names=["x"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    return path


def _preprocessed(model: nn.Module, samples: Tensor, folder: Path) -> Path:
    """Return the file after the pass that onnxruntime asks for before quantization: it folds BatchNorm."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path = folder / "preprocessed.onnx"
    quant_pre_process(_exported(model, samples, folder), path)
    return path


def _session(path: Path, accuracy_level: int | None = None) -> Run:
    """Return what runs a file; at level 1 packed weights are multiplied by inputs in float32, by default in int8."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads spin while it runs, but not on into the turn of the next one.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if accuracy_level is not None:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(accuracy_level))
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {given.name: x.numpy()})[0])

    return run


ONNX_PACKAGES = ("onnxruntime", "onnx", "onnxscript")

#: Packages of the peers, in the order of the tables.
PACKAGES = ("torchao", *ONNX_PACKAGES)
#: Of those of ``convert`` and ``matmul``.
TENSOR_PACKAGES = ("bitsandbytes", "torchao")

_FLOAT_FILE = Peer("onnxruntime float32", _onnxruntime_float, ONNX_PACKAGES)

LINEAR_PEERS = (
    Peer("torch.ao dynamic, per tensor", _torch_ao_dynamic),
    Peer("torchao int8, dynamic per token", _torchao_dynamic, ("torchao",)),
    _FLOAT_FILE,
    Peer("onnxruntime int8, dynamic", _onnxruntime_dynamic, ONNX_PACKAGES),
)

#: Of networks in onnxruntime alone.
NETWORK_FILES = (
    _FLOAT_FILE,
    Peer("onnxruntime int8, QDQ static", _onnxruntime_static, ONNX_PACKAGES),
    Peer("onnxruntime int8, our file", _ours_in_onnxruntime, ONNX_PACKAGES),
)
#: Of Linears.
WEIGHT_ONLY_FILES = (
    _FLOAT_FILE,
    Peer("onnxruntime int4, our file, inputs in 8 bits", _ours_weight_only, ONNX_PACKAGES),
    Peer("onnxruntime int4, our file, inputs in float32", _ours_with_float_inputs, ONNX_PACKAGES),
)

NETWORK_PEERS = (Peer("torch.ao FX", _torch_ao_fx), *NETWORK_FILES)

#: Of one Linear in a Sequential.
MATMUL_PEERS = (
    Peer("torch.ao dynamic, per tensor", _torch_ao_dynamic, bits=8),
    Peer("torchao int8, dynamic per token", _torchao_dynamic, ("torchao",), bits=8),
    Peer("bitsandbytes Linear8bitLt", _bitsandbytes_int8, ("bitsandbytes",), bits=8),
    Peer("bitsandbytes Linear4bit nf4", _bitsandbytes_nf4, ("bitsandbytes",), bits=4.5),
)

MATMUL_PEERS_GPU = (
    Peer("torch.compile", _torch_compile),
    Peer("torchao int8, dynamic per token", _torchao_dynamic, ("torchao",), bits=8),
    Peer("torchao int4, group 128", _torchao_int4, ("torchao",), bits=4.25),
    *MATMUL_PEERS[-2:],
)
