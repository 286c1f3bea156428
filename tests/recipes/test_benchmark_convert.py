"""Group ``convert`` compares codes with bitsandbytes' bytes and the definition before it times."""

import importlib.util
from dataclasses import replace

import pytest
import torch

from lightning_qat.recipes import _benchmark_formats
from lightning_qat.recipes._benchmark_convert import _judged, convert_group, differences, measured, verified
from lightning_qat.recipes._benchmark_formats import Format, Way, all_formats
from lightning_qat.recipes._timing import Conditions, Gauge

SIDE = 128
TINY = Conditions(1, size=SIDE, gauge=Gauge(torch.device("cpu"), elements=64, side=8))
OURS = ["torch eager", "lightning_qat"]

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@pytest.fixture
def x():
    return torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def format_called(start, x):
    (found,) = [each for each in all_formats(x) if each.name.startswith(start)]
    return found


def test_every_format_is_measured_both_ways_with_its_peers(x):
    results = convert_group(TINY)
    groups = {}
    for timing in results.timings:
        groups.setdefault(timing.group, []).append(timing)
    formats = all_formats(x)
    assert list(groups) == [
        f"convert {each.name}: {what} 128 x 128" for each in formats for what in ("quantize", "dequantize")
    ]
    for each in formats:
        names = [name for name, way in each.peers.items() if way.installed] + ["torch eager", *each.ours]
        for what in ("quantize", "dequantize"):
            timings = groups[f"convert {each.name}: {what} 128 x 128"]
            assert [timing.name for timing in timings] == names
            assert timings[0].ratio == 1.0
            assert all(timing.of_copy > 0 and timing.of_matrix is None for timing in timings)
    # Known of bitsandbytes: values that are wrong for some shapes, which is told.
    assert [note for note in results.notes if "bitsandbytes gives values" not in note] == []


@pytest.mark.parametrize(
    ("start", "bits"),
    [
        ("nf4, ", 4 + 32 / 64),
        ("dynamic_tree", 8 + 32 / 256),
        ("nf4 nested", 4 + 8 / 64 + 32 / 64 / 256 + 32 / SIDE**2),
        ("llm_int8", 8 + 32 / SIDE),
        ("int8", 8 + 32 / SIDE),
        ("int4", 4 + 32 / 128),
    ],
)
def test_bytes_are_those_of_the_float_tensor_and_of_what_is_stored(x, start, bits):
    timings = measured(format_called(start, x), x, TINY).timings
    assert {timing.moved for timing in timings} == {SIDE * SIDE * (32 + bits) / 8}


def test_a_wrong_code_of_the_public_functions_is_not_timed(monkeypatch, x):
    right = _benchmark_formats.quantize

    def wrong(tensor, config):
        held = right(tensor, config)
        packed = held.packed.clone()
        packed.view(-1)[5] ^= 1
        return replace(held, packed=packed)

    monkeypatch.setattr(_benchmark_formats, "quantize", wrong)
    size = {"nf4": 8192, "fp4": 8192, "int4": 8192}
    for each in all_formats(x):
        count = size.get(each.name.split()[0].rstrip(","), 16384)
        with pytest.raises(RuntimeError, match=rf"lightning_qat differs .* codes \(1 of {count}, the first at 5\)"):
            verified(each, x)


def test_wrong_values_of_the_op_are_not_timed(x):
    each = format_called("fp4", x)
    op = each.ours["lightning_qat, the op alone"]
    ways = {"lightning_qat, the op alone": replace(op, dequantize=lambda held: op.dequantize(held) + 0.5)}
    with pytest.raises(RuntimeError, match=r"the op alone differs from the definition of fp4.* values by up to 0\.5"):
        verified(replace(each, ours=ways), x)


@needs_bitsandbytes
def test_another_byte_of_bitsandbytes_is_told_and_nothing_timed(monkeypatch, x):
    from bitsandbytes import functional

    right = functional.quantize_4bit

    def wrong(*args, **kwargs):
        codes, state = right(*args, **kwargs)
        codes[3] ^= 16
        state.absmax[0] += 1
        return codes, state

    monkeypatch.setattr(functional, "quantize_4bit", wrong)
    message = r"bitsandbytes and the definition .* codes \(1 of 8192, the first at 3\), scale \(1 of 256, the first at"
    with pytest.raises(RuntimeError, match=message):
        verified(format_called("nf4, ", x), x)


@needs_bitsandbytes
@pytest.mark.parametrize("start", ["nf4, ", "fp4", "dynamic_tree", "nf4 nested", "llm_int8"])
def test_bitsandbytes_has_our_bytes_and_is_the_baseline(x, start):
    ways, decibels, _ = verified(format_called(start, x), x)
    assert next(iter(ways)) == "bitsandbytes"
    assert decibels["lightning_qat"] == decibels["torch eager"] > 15


def peers(x, **others):
    each = format_called("int8 per", x)
    return replace(each, peers=others)


def test_wrong_values_of_a_peer_are_told_but_timed(x):
    each = format_called("int8 per", x)
    way = replace(each.definition, dequantize=lambda held: each.definition.dequantize(held) + 2.0)
    ways, _, notes = verified(peers(x, other=way), x)
    assert list(ways) == ["other", "torch eager", "lightning_qat"]
    assert notes == ["other gives values of int8 per channel that are off by up to 2 from its own codes and scales"]


def test_a_peer_that_fails_or_is_worse_is_a_note_and_one_that_is_not_installed_is_left_out(x):
    def broken(tensor):
        raise RuntimeError("no such kernel\nand a page more")

    coarse = Way(lambda tensor: tensor, torch.round)
    absent = Way(broken, torch.round, package="no_such_package_is_installed")
    ways, _, notes = verified(peers(x, broken=Way(broken, torch.round), coarse=coarse, absent=absent), x)
    assert list(ways) == OURS
    assert notes[0] == "broken is not timed for int8 per channel: RuntimeError: no such kernel"
    assert notes[1].startswith("coarse is not timed for int8 per channel: its values are ")
    assert notes[1].endswith(" dB worse than ours")
    assert len(notes) == 2


def test_differences_tell_dtype_size_and_place():
    right = {"codes": torch.zeros(10, dtype=torch.uint8)}
    assert differences(right, {"codes": torch.zeros(10, dtype=torch.uint8)}) == []
    assert differences(right, {"codes": torch.zeros(9, dtype=torch.uint8)})[0].startswith("codes (torch.uint8, 9 ")
    assert "torch.int8" in differences(right, {"codes": torch.zeros(10, dtype=torch.int8)})[0]
    one = {"codes": torch.eye(10, dtype=torch.uint8)[7]}
    assert differences(right, one) == ["codes (1 of 10, the first at 7)"]
    assert differences(right, one, allowed=0.1) == []


def test_a_way_of_ours_needs_codes_to_compare(x):
    with pytest.raises(ValueError, match="have codes to compare"):
        verified(Format("none", Way(lambda tensor: tensor, torch.round), {}), x)


class OnGPU(torch.Tensor):
    is_cuda = True


def test_a_peer_with_other_codes_on_a_gpu_is_left_out_and_told():
    """On a CPU other bytes are an error; of a GPU's few may differ, and the rest of the benchmark goes on."""
    codes = torch.zeros(100_000, dtype=torch.uint8)
    peer = Way(lambda x: None, lambda held: None, lambda held: {"codes": held})
    values = torch.zeros(4).as_subclass(OnGPU)
    for wrong, timed in ((0, True), (9, True), (12, False)):
        held = codes.clone()
        held[:wrong] = 1
        found = _judged("peer", "fp4", peer, held, torch.zeros(4), {"codes": codes}, values, {})
        assert found.timed == timed
        assert [note.endswith("; not timed") for note in found.notes] == ([not timed] if wrong else [])
    held = codes.clone()
    held[0] = 1
    with pytest.raises(RuntimeError, match="codes \\(1 of 100000, the first at 0\\); not timed"):
        _judged("peer", "fp4", peer, held, torch.zeros(4), {"codes": codes}, torch.zeros(4), {})
