"""The phase is a pure function of the step."""

import pytest

from lightning_qat.callbacks.schedule import Schedule
from lightning_qat.transforms.phase import Phase


def test_units_resolve_once():
    schedule = Schedule(start=0.25, freeze_scales="3 epochs", freeze_norm=7, weight_bits=((0.5, 4), (0, 16)))
    resolved = schedule.resolve(200, 10)
    assert resolved == Schedule(start=50, freeze_scales=30, freeze_norm=7, weight_bits=((0, 16), (100, 4)))
    assert Schedule.from_state_dict(resolved.state_dict()) == resolved
    assert resolved.resolve(float("inf"), float("inf")) == resolved


def test_phase_at_every_step():
    schedule = Schedule(
        start=2, freeze_scales=5, freeze_norm=4, weight_bits=((1, 8), (3, 4)), activation_bits=((3, 6),)
    )
    phases = [schedule.phase(step) for step in range(7)]
    assert [p.quantizing for p in phases] == [False, False, True, True, True, True, True]
    assert [p.frozen for p in phases] == [False] * 5 + [True] * 2
    assert [p.observing for p in phases] == [True] * 5 + [False] * 2
    assert [p.frozen_norm for p in phases] == [False] * 4 + [True] * 3
    assert [p.weight_bits for p in phases] == [None, 8, 8, 4, 4, 4, 4]
    assert [p.activation_bits for p in phases] == [None, None, None, 6, 6, 6, 6]
    assert Schedule().phase(0) == Phase()


@pytest.mark.parametrize(("step", "needs"), [(0.3, "max_steps or max_epochs"), ("2 epochs", "limit_train_batches")])
def test_an_unknown_length_is_told(step, needs):
    with pytest.raises(ValueError, match=needs):
        Schedule(start=step).resolve(float("inf"), float("inf"))


def test_explain_is_in_order():
    rows = Schedule(start=5, freeze_scales=9, weight_bits=((7, 4),), calibration_batches=3).explain()
    assert [when for when, _ in rows] == ["step 0", "step 0", "step 5", "step 7", "step 9"]
    assert "3 training batches" in rows[0][1]
    assert ("30% of the run", "train fake-quantized") in Schedule(start=0.3).explain()
    assert ("after 3 epochs", "scales stand still") in Schedule(freeze_scales="3 epochs").explain()
