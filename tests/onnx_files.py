"""Models converted, written as ONNX and run by onnxruntime; tests that need its packages are skipped without them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_qat as lq

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def run(
    path: Path, *inputs: Tensor, optimized: bool = False, float_inputs: bool = False
) -> tuple[Tensor, Counter[str]]:
    """Return the first output, and how many operators of each kind ran.

    Args:
        path: of the file; the graph that ran is written beside it.
        inputs: of the graph, in its order.
        optimized: with all fusions of onnxruntime, or with none.
        float_inputs: read packed weights with inputs in float32; by itself onnxruntime quantizes them to 8 bits.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    if float_inputs:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    options.optimized_model_filepath = str(path.with_suffix(".run"))
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    found = session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})
    nodes = onnx.load(path.with_suffix(".run")).graph.node
    return torch.from_numpy(found[0]), Counter(node.op_type for node in nodes)


def converted(model: nn.Module, plan: Any, *batches: Any) -> nn.Module:
    model.eval()
    lq.prepare(model, plan)
    if batches:
        lq.calibrate(model, batches)
    return lq.convert(model)


def reference(model: nn.Module, *inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(*inputs)
