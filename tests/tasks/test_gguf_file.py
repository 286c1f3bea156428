"""What the package gguf writes is read as the package itself reads it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_qat.tasks.gguf_file import read_gguf

gguf = pytest.importorskip("gguf", reason="pip install gguf")

TYPES = [gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "Q4_1", "Q8_0")]


def write(path: Path, kinds: list[gguf.GGMLQuantizationType]) -> dict[str, np.ndarray]:
    """Write a tensor of each type and metadata of many; return what gguf makes of the tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(3)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_bool("odd", True)
    writer.add_token_list(["a", "é", ""])
    writer.add_token_types([1, 1, 3])
    random = np.random.default_rng(0)
    expected = {}
    for i, kind in enumerate(kinds):
        stored = gguf.quantize(random.standard_normal((3 + i, 64)).astype(np.float32), kind)
        writer.add_tensor(f"t{i}", stored, raw_dtype=kind)
        expected[f"t{i}"] = gguf.dequantize(stored, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def test_metadata_and_tensors(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    expected = write(path, TYPES)
    file = read_gguf(path)
    theirs = gguf.GGUFReader(path)
    kept = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert dict(file.facts) == kept
    assert file.facts["tokenizer.ggml.tokens"] == ["a", "é", ""]
    assert set(file.tensors) == set(expected)
    for name, values in expected.items():
        assert torch.equal(file.read(name), torch.from_numpy(values.astype(np.float32))), name


def test_an_unknown_type_is_named(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", [gguf.GGMLQuantizationType.Q5_0])
    with pytest.raises(ValueError, match=r"'t0' has ggml type 6; only F32, F16, Q4_1 and Q8_0"):
        read_gguf(tmp_path / "model.gguf").read("t0")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGML" + bytes(20), b"GGUF\x02\0\0\0" + bytes(16)])
def test_another_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.gguf is (not a GGUF|damaged)"):
        read_gguf(path)


def test_a_cut_off_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write(path, TYPES)
    whole = path.read_bytes()
    path.write_bytes(whole[:200])
    with pytest.raises(ValueError, match="is damaged"):
        read_gguf(path)
    path.write_bytes(whole[: read_gguf_start(whole, tmp_path) + 4])
    with pytest.raises(ValueError, match="ends within 't0'"):
        read_gguf(path).read("t0")


def read_gguf_start(whole: bytes, folder: Path) -> int:
    """Return where the first tensor begins."""
    path = folder / "whole.gguf"
    path.write_bytes(whole)
    return min(offset for _, _, offset in read_gguf(path).tensors.values())
