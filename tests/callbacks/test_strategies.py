"""Two ranks have the same scales, bit for bit, and are one rank with twice the batch."""

import pytest
import ranks
import torch
from torch import nn

import lightning_qat as lq
from lightning_qat.transforms.prepare import qat_layers
from lightning_qat.transforms.ranges import defer_ranges, update_ranges

pytestmark = pytest.mark.slow

#: Of runs with BatchNorm: a bias before one has no gradient but rounding, and steps add it up.
NOISE = 5e-6
#: The gradient of an input's scale adds up rounding errors, of at most half a step; the input is up to 255 steps, so
#: the last bit of an input (2^-24) is 3e-5 of its rounding error. Which inputs differ in it depends on the CPU.
OF_ROUNDING_ERRORS = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def two(folder):
    return ranks.run_two(folder)


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key], key


def assert_rounding_apart(two, one, atol=1e-6, of_input_scales=1e-5):
    """Gradients summed over ranks are rounded otherwise; that is all that may differ: scales by an ulp or two."""
    for key, value in two.items():
        if isinstance(value, torch.Tensor):
            rtol = of_input_scales if key.endswith("input_quantizer.learned.exponent") else 1e-5
            torch.testing.assert_close(value, one[key], rtol=rtol, atol=atol, msg=lambda m, key=key: f"{key}: {m}")
        else:
            assert value == one[key], key


@pytest.mark.parametrize("scenario", [ranks.ddp, ranks.uncalibrated, ranks.accumulating], ids=lambda s: s.__name__)
def test_ddp_has_the_same_scales_on_both_ranks_and_is_one_rank_with_twice_the_batch(tmp_path, two, scenario):
    first, second = (rank[scenario.__name__] for rank in two)
    assert len(first["steps"]) == len(second["steps"]) == 16  # before and after each of 8 batches
    for mine, theirs in zip(first["steps"], second["steps"], strict=True):
        assert_same_bits(mine, theirs)
    assert_same_bits(first["state"], second["state"])
    alone = scenario(tmp_path, 1, 0)
    for mine, theirs in zip(first["steps"], alone["steps"], strict=True):
        assert_rounding_apart(mine, theirs)
    assert_rounding_apart(first["state"], alone["state"])
    moved = [step["conv.input"] for step in first["steps"]]
    assert len({scale.item() for scale in moved}) > 4  # the ranges did move


def test_ranks_reduce_bits_and_roll_back_together_whatever_each_of_them_sees(two):
    """The metric of one rank is flat where the other's is not, and NaN where the other's is a number."""
    first, second = (rank["deciding"] for rank in two)
    for run in ("gated", "ordered"):
        for mine, theirs in zip(first[run].pop("steps"), second[run].pop("steps"), strict=True):
            assert_same_bits(mine, theirs)
        assert_same_bits(first[run].pop("state"), second[run].pop("state"))
    assert first == second
    assert first["rolled_back"] == 1
    assert [sorted(order) for order in first["orders"][1]] == [["conv", "head"]] * 2


def test_ranks_learn_all_scales_but_those_of_the_data(tmp_path, two):
    first, second = (rank["fixed_data"] for rank in two)
    for mine, theirs in zip(first["steps"], second["steps"], strict=True):
        assert_same_bits(mine, theirs)
    assert len({step["conv.input"].item() for step in first["steps"]}) == 1
    assert len({step["head.input"].item() for step in first["steps"]}) > 4
    alone = ranks.fixed_data(tmp_path, 1, 0)
    assert_rounding_apart(first["state"], alone["state"])


def test_ranks_that_run_different_layers_agree_and_do_not_wait_for_each_other(two):
    first, second = (rank["branches"] for rank in two)
    for mine, theirs in zip(first["steps"], second["steps"], strict=True):
        assert_same_bits(mine, theirs)
    assert_same_bits(first["state"], second["state"])
    seen = [first["state"][f"ways.{i}.input_quantizer._extra_state"] for i in range(3)]
    assert [state["calibrated"] for state in seen] == [True, True, False]
    mine, theirs = (rank["other_layers"] for rank in two)
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert mine[name][0] == theirs[name][0]
        assert torch.equal(mine[name][1], theirs[name][1])
    assert [found[0] for found in mine.values()] == [True, True, False]


def test_calibration_learns_from_all_ranks(tmp_path, two):
    """Bit for bit: extremes and counts do not depend on how samples are spread over ranks."""
    first, second = (rank["calibration"] for rank in two)
    for observer, alone in ranks.calibration(tmp_path, 1, 0).items():
        assert_same_bits(first[observer], second[observer])
        sums = [key for key in alone if key.endswith("sums")]
        assert bool(sums) == (observer == "mse")
        for key in sums:  # of float64, added in another order
            torch.testing.assert_close(first[observer].pop(key), alone.pop(key), rtol=1e-12, atol=1e-12)
        assert_same_bits(first[observer], alone)


def test_fsdp2_is_one_process_and_its_checkpoint_converts(tmp_path, two, folder):
    first, second = (rank["fsdp"] for rank in two)
    assert_same_bits(first["state"], second["state"])
    alone = ranks.fsdp(tmp_path, 1, 0)
    assert_rounding_apart(first["state"], alone["state"])
    assert first["state"]["last.weight_quantizer._extra_state"]["bits"] == 4
    assert "sharded over ranks" in first["error"]
    module = ranks.Sharded()
    lq.prepare(module, ranks.int8()[0].plan())
    module.load_state_dict(torch.load(folder / "fsdp2.ckpt")["state_dict"])
    assert_same_bits(module.state_dict(), first["state"])
    assert lq.convert(module).last.weight_format.bits == 4


def test_scales_that_fsdp2_has_not_seen_learn_of_all_ranks(tmp_path, two):
    first, second = (rank["learned_fsdp"]["state"] for rank in two)
    assert_same_bits(first, second)
    assert_rounding_apart(first, ranks.learned_fsdp(tmp_path, 1, 0)["state"])


@pytest.fixture(scope="module")
def normed(two, tmp_path_factory):
    """Each rank's runs with SyncBatchNorm, and those of one rank with BatchNorm and twice the batch."""
    return (*(rank["synced_norms"] for rank in two), ranks.synced_norms(tmp_path_factory.mktemp("alone"), 1, 0))


def test_the_stand_in_for_syncbatchnorm_is_batchnorm_of_both_ranks_batches(normed):
    first, second, alone = (runs["float"] for runs in normed)
    assert first["synced"] == second["synced"] == 3 * 8  # norms and steps
    assert alone["synced"] == 0
    assert_same_bits(first["state"], second["state"])
    assert_normed_as_one_rank(first, second, alone)
    assert first["state"]["bn.running_var"].ne(1).all()


@pytest.mark.parametrize(("run", "steps"), [("ranges", 6), ("uncalibrated", 8), ("still", 5), ("learned", 8)])
def test_ranks_with_syncbatchnorm_are_one_rank_with_twice_the_batch(normed, run, steps):
    """``freeze_step`` and ``BatchNormFolding`` let the statistics stand still: from then on nothing is synchronized."""
    first, second, alone = (runs[run] for runs in normed)
    assert first["synced"] == second["synced"] == 3 * steps
    for mine, theirs in zip(first["steps"], second["steps"], strict=True):
        assert_same_bits(mine, theirs)
    for part in ("state", "converted"):
        assert_same_bits(first[part], second[part])
    assert_normed_as_one_rank(first, second, alone)
    assert len({step["head.weight"][0].item() for step in first["steps"]}) > 4  # the scales did move
    assert first["folds"] == alone["folds"] == {"conv": "bn", "deep": "deep_bn", "wide": "wide_bn", "head": ""}
    for layer in first["folds"]:
        name = f"{layer}.weight_packed"
        assert torch.equal(first["converted"][name], alone["converted"][name]), layer
    assert_rounding_apart(first["converted"], alone["converted"], NOISE)
    assert not any(name.startswith(("bn.", "deep_bn.", "wide_bn.")) for name in first["converted"])


def assert_normed_as_one_rank(first, second, alone):
    assert len(first["gradients"]) == len(alone["gradients"]) == len(alone["outputs"]) == 8
    for i, both in enumerate(alone["outputs"]):
        for rank, mine in enumerate((first, second)):
            torch.testing.assert_close(mine["outputs"][i], both[rank::2], rtol=1e-5, atol=NOISE)
    for mine, theirs in zip(first["steps"], alone["steps"], strict=True):
        assert_rounding_apart(mine, theirs, NOISE)
    for mine, theirs in zip(first["gradients"], alone["gradients"], strict=True):
        assert_rounding_apart(mine, theirs, NOISE, OF_ROUNDING_ERRORS)
    assert_rounding_apart(first["state"], alone["state"], NOISE)


def test_a_checkpoint_in_the_middle_of_a_batch_holds_what_the_batch_showed():
    def run(interrupted):
        torch.manual_seed(0)
        model = lq.prepare(nn.Sequential(nn.Linear(3, 3)), "int8")
        defer_ranges(model, True)
        for step in range(3):
            model(torch.full((2, 3), 1.0 + step))
            if interrupted:
                state = model.state_dict()
                model = lq.prepare(nn.Sequential(nn.Linear(3, 3)), "int8")
                model.load_state_dict(state)
                defer_ranges(model, True)
            update_ranges(model)
        return model.state_dict()

    assert_same_bits(run(True), run(False))


def test_ranges_learned_in_a_batch_hold_from_the_next_one():
    model = lq.prepare(nn.Linear(3, 3), "int8")
    defer_ranges(model, True)
    x = torch.full((2, 3), 0.3)
    with torch.no_grad():
        assert torch.equal(model(x), nn.functional.linear(x, model.weight_quantizer(model.weight), model.bias))
        update_ranges(model)
        scale = model.input_quantizer.scale.clone()
        model(x * 100)
        assert torch.equal(model.input_quantizer.scale, scale)
        update_ranges(model)
        assert model.input_quantizer.scale > scale
        state = {name: layer.input_quantizer.scale.clone() for name, layer in qat_layers(model)}
        update_ranges(model)  # nothing was run
        assert torch.equal(state[""], model.input_quantizer.scale)


def test_weights_that_a_strategy_flattens_are_told_before_they_freeze():
    quantizer = lq.prepare(nn.Linear(4, 4), "int8").weight_quantizer
    with pytest.raises(RuntimeError, match="flattens or partitions it.*ModelParallelStrategy with fully_shard"):
        quantizer.set_frozen(True, torch.zeros(0))
