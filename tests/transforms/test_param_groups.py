"""Learned scales in the user's optimizer, by hand and by themselves, with every scheduler."""

import warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers

import lightning_qat as lq
from lightning_qat.transforms.param_groups import learned_scales, quantization_param_groups, separate_scales

CONFIG = lq.QATConfig("int4", activation_bits=4, learnable_step_size=True)


def model_of():
    return lq.prepare(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), CONFIG)


def scales_of(model):
    return {id(p) for learned in learned_scales(model) for p in learned.parameters()}


def assert_apart(model, optimizer):
    """Every scale is in the optimizer once, in groups without anything else and without weight decay."""
    scales = scales_of(model)
    found = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(found) == len(set(found))
    assert scales <= set(found)
    for group in optimizer.param_groups:
        inside = {id(p) for p in group["params"]}
        assert inside <= scales or not inside & scales
        if inside and inside <= scales:
            assert group["weight_decay"] == 0


def test_groups_by_hand():
    model = model_of()
    rest, scales = quantization_param_groups(model, 1e-2, 1e-3, weight_decay=0.1)
    assert [len(rest["params"]), len(scales["params"])] == [4, 6]
    optimizer = torch.optim.AdamW([rest, scales])
    assert_apart(model, optimizer)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(1e-2, 0.1), (1e-3, 0.0)]
    assert separate_scales(model, [optimizer], lr=5.0) == 0  # as the user made them
    assert len(quantization_param_groups(nn.Linear(2, 2), 1e-2, 1e-3)) == 1
    with pytest.raises(ValueError, match="quantization_lr=0"):
        quantization_param_groups(model, 1e-2, 0)


def test_scales_move_out_of_the_users_group_and_keep_their_state():
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1)
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    before = dict(optimizer.state.items())
    assert separate_scales(model, [optimizer]) == 1
    assert_apart(model, optimizer)
    assert optimizer.state == before
    assert [len(g["params"]) for g in optimizer.param_groups] == [4, 6]
    assert separate_scales(model, [optimizer]) == 0


def test_scales_follow_their_layers_weight():
    model = model_of()
    first = torch.optim.SGD([{"params": model[2].weight}, {"params": model[0].weight, "lr": 0.5}], 0.1, momentum=0.9)
    second = torch.optim.Adam([model[0].bias], 0.2)
    assert separate_scales(model, [second, first]) == 2
    # Layer 0 has its bias in ``second`` and its weight in ``first``: the weight says where.
    assert_apart(model, first)
    by_id = {id(p): g["lr"] for g in first.param_groups for p in g["params"]}
    assert by_id[id(model[0].weight_quantizer.learned.exponent)] == 0.5
    assert by_id[id(model[2].weight_quantizer.learned.exponent)] == 0.1


def test_layers_that_no_optimizer_has_give_their_scales_to_the_first():
    model = model_of()
    optimizer = torch.optim.SGD([model[2].weight], 0.1)
    separate_scales(model, [optimizer])
    assert_apart(model, optimizer)


MADE = {
    "step": lambda o: schedulers.StepLR(o, 2),
    "lambda": lambda o: schedulers.LambdaLR(o, lambda step: 1 / (step + 1)),
    "lambdas": lambda o: schedulers.LambdaLR(o, [lambda step: 1 / (step + 1)]),
    "multiplicative": lambda o: schedulers.MultiplicativeLR(o, lambda step: 0.9),
    "multi_step": lambda o: schedulers.MultiStepLR(o, [1, 3]),
    "exponential": lambda o: schedulers.ExponentialLR(o, 0.9),
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, 10),
    "restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3),
    "polynomial": lambda o: schedulers.PolynomialLR(o, 8),
    "linear": lambda o: schedulers.LinearLR(o),
    "constant": lambda o: schedulers.ConstantLR(o),
    "one_cycle": lambda o: schedulers.OneCycleLR(o, 0.4, total_steps=10),
    "cyclic": lambda o: schedulers.CyclicLR(o, 0.01, 0.4, step_size_up=3),
    "sequential": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o), schedulers.CosineAnnealingLR(o, 5)], [3]
    ),
    "chained": lambda o: schedulers.ChainedScheduler([schedulers.LinearLR(o), schedulers.ExponentialLR(o, 0.9)]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("lr", [None, 0.02])
def test_schedules_go_on_as_if_the_group_had_been_there(name, lr):
    """The witness: an optimizer made with the groups by hand, under the same scheduler."""
    torch.manual_seed(0)
    model, twin = model_of(), model_of()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    scheduler = MADE[name](optimizer)
    separate_scales(model, [optimizer], [scheduler], lr)
    by_hand = quantization_param_groups(twin, 0.1, 0.1 if lr is None else lr)
    expected = torch.optim.SGD(by_hand, 0.1, momentum=0.9)
    factor = 1.0
    if name in ("one_cycle", "cyclic"):  # they take no notice of the learning rate that a group was made with
        factor = 1.0 if lr is None else lr / 0.4
    made = "lambda" if name == "lambdas" else name
    reference = MADE[made](expected)
    for _ in range(8):
        found, wanted = ([g["lr"] for g in o.param_groups] for o in (optimizer, expected))
        torch.testing.assert_close(found, [wanted[0], wanted[1] * factor])
        assert len(scheduler.get_last_lr()) == 2
        for each in (optimizer, expected):
            each.step()
        scheduler.step()
        reference.step()
    state = scheduler.state_dict()
    scheduler.load_state_dict(state)


@pytest.mark.parametrize("name", ["one_cycle", "cyclic"])
def test_a_cycle_takes_scales_up_to_their_own_learning_rate(name):
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    scheduler = MADE[name](optimizer)
    separate_scales(model, [optimizer], [scheduler], 0.02)
    seen = []
    for _ in range(9):
        seen.append([g["lr"] for g in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    assert [max(rates) for rates in zip(*seen, strict=True)] == pytest.approx([0.4, 0.02])


def test_lbfgs_keeps_scales_in_its_one_group():
    model = model_of()
    optimizer = torch.optim.LBFGS(model.parameters())
    assert separate_scales(model, [optimizer]) == 0
    assert len(optimizer.param_groups) == 1
    beside = torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1)
    assert separate_scales(model, [beside, optimizer]) == 0
    with pytest.raises(ValueError, match=r"lr=0.1 of the learned scales is not possible with LBFGS"):
        separate_scales(model, [optimizer], lr=0.1)


def test_plateau_schedulers_go_on():
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scheduler = schedulers.ReduceLROnPlateau(optimizer, patience=0, factor=0.5, min_lr=0.03)
    separate_scales(model, [optimizer], [scheduler], 0.02)
    for _ in range(6):
        scheduler.step(1.0)
    torch.testing.assert_close([g["lr"] for g in optimizer.param_groups], [0.03, 0.006])


class OwnSchedule(schedulers.LRScheduler):
    def __init__(self, optimizer):
        self.floors = [0.1] * len(optimizer.param_groups)
        super().__init__(optimizer)

    def get_lr(self):
        return [max(lr * 0.9, floor) for lr, floor in zip(self.base_lrs, self.floors, strict=True)]


def test_a_scheduler_with_numbers_of_its_own_is_refused_and_works_with_groups_by_hand():
    model = model_of()
    optimizer = torch.optim.SGD([{"params": model[0].parameters()}, {"params": model[2].parameters()}], 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = OwnSchedule(optimizer)
    with pytest.raises(ValueError, match="OwnSchedule keeps 'floors'.*quantization_param_groups"):
        separate_scales(model, [optimizer], [scheduler])
    by_hand = torch.optim.SGD(quantization_param_groups(model, 1.0, 0.1))
    assert separate_scales(model, [by_hand], [OwnSchedule(by_hand)]) == 0


class OwnPeak(schedulers.LRScheduler):
    def __init__(self, optimizer):
        self.peaks = [group["lr"] for group in optimizer.param_groups]
        super().__init__(optimizer)

    def get_lr(self):
        return [peak / (1 + self.last_epoch) for peak in self.peaks]


class NoneOfPyTorch:
    """As those of timm, which know no ``LRScheduler``."""

    def __init__(self, optimizer):
        self.optimizer, self.base_values = optimizer, [group["lr"] for group in optimizer.param_groups]

    def step(self, time):
        for group, value in zip(self.optimizer.param_groups, self.base_values, strict=False):
            group["lr"] = value * 0.5**time


@pytest.mark.parametrize("groups", [1, 2])
def test_rates_that_a_scheduler_of_ones_own_keeps_go_on(groups):
    for kind in (OwnPeak, NoneOfPyTorch):
        model = model_of()
        apart = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.5}]
        optimizer = torch.optim.SGD(model.parameters() if groups == 1 else apart, 1.0)
        scheduler = kind(optimizer)
        assert separate_scales(model, [optimizer], [scheduler], 0.25) == groups
        optimizer.step()
        scheduler.step() if kind is OwnPeak else scheduler.step(1)
        expected = [0.5, 0.125] if groups == 1 else [0.5, 0.25, 0.125, 0.125]
        assert [group["lr"] for group in optimizer.param_groups] == expected


def test_a_scheduler_that_has_no_rate_for_the_new_group_is_refused():
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    scheduler = OwnSchedule(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="OwnSchedule keeps numbers.*quantization_param_groups"):
            separate_scales(model, [optimizer], [scheduler])


class OwnStep(schedulers.LRScheduler):
    """Has no ``get_lr``."""

    def step(self, epoch=None):
        self.last_epoch += 1
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * 0.5**self.last_epoch


class OwnRates(schedulers.LRScheduler):
    def get_lr(self):
        return (group["initial_lr"] * 0.5**self.last_epoch for group in self.optimizer.param_groups)


@pytest.mark.parametrize("kind", [OwnStep, OwnRates])
def test_a_scheduler_of_ones_own_that_keeps_nothing_goes_on(kind):
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    scheduler = kind(optimizer)
    before = scheduler.last_epoch
    assert separate_scales(model, [optimizer], [scheduler], 0.25) == 1
    optimizer.step()
    scheduler.step()
    factor = 0.5 ** (before + 1)
    assert [group["lr"] for group in optimizer.param_groups] == [factor, 0.25 * factor]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="Muon came with torch 2.9")
@pytest.mark.parametrize("group_size", [None, 2])
def test_muon_gets_no_scale(group_size):
    model = lq.prepare(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2, bias=False)),
        lq.QATConfig("int4", per_channel=True, group_size=group_size, activation_bits=None, learnable_step_size=True),
    )
    model(torch.randn(3, 4))
    muon = torch.optim.Muon([p for p in model.parameters() if p.dim() == 2], 0.1)
    with pytest.raises(ValueError, match="Muon updates matrices alone.*a second optimizer"):
        separate_scales(model, [muon])
    adam = torch.optim.AdamW([model[0].bias], 0.01)
    assert separate_scales(model, [muon, adam], lr=0.001) == 1
    assert separate_scales(model, [muon, adam], lr=0.001) == 0
    ids = [[id(p) for p in group["params"]] for group in (*muon.param_groups, *adam.param_groups)]
    learned = [id(p) for scale in learned_scales(model) for p in scale.parameters()]
    assert ids == [[id(model[0].weight), id(model[1].weight)], [id(model[0].bias)], learned]
    assert adam.param_groups[1]["lr"] == 0.001
    model(torch.randn(3, 4)).sum().backward()
    muon.step()
    adam.step()
