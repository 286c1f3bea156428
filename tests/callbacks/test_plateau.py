"""Numbers in, an answer out."""

import math

import pytest

from lightning_qat.callbacks.plateau import Plateau


def looks(values, guards=None, **settings):
    plateau = Plateau(**{"mode": "min", "min_delta": 0.1, "patience": 2, "divergence": 2.0, "recovery": 2, **settings})
    return plateau, [plateau.look(v, g) for v, g in zip(values, values if guards is None else guards, strict=True)]


def test_flat_after_patience_looks_without_an_improvement():
    _, found = looks([1.0, 0.8, 0.75, 0.74, 0.5, 0.49, 0.46])
    assert found == ["", "", "", "flat", "", "", "flat"]


def test_a_metric_to_be_maximized_and_negative_values():
    assert looks([-1.0, -0.8, -0.79, -0.78], mode="max")[1] == ["", "", "", "flat"]
    assert looks([-1.0, -1.2, -1.21, -1.22])[1] == ["", "", "", "flat"]
    assert looks([1.0, 1.2, 1.21, 1.22], [0.0] * 4, rising=True)[1] == ["", "", "", "flat"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_diverges_at_once(value):
    assert looks([1.0, value])[1] == ["", "diverged"]
    assert looks([math.inf], [1.0], rising=True)[1] == [""]  # an SQNR without noise


@pytest.mark.parametrize(("mode", "bad", "good"), [("min", 2.1, 1.9), ("max", 0.4, 0.6)])
def test_worse_by_a_factor_than_before_the_reduction(mode, bad, good):
    plateau, _ = looks([1.0], mode=mode)
    assert plateau.look(bad, bad) == ""  # nothing was reduced yet
    plateau.begin(reduced=True)
    before = bad
    assert plateau.look(before * bad, before * bad) == ""
    assert plateau.look(before * good, before * good) == ""  # it recovered
    assert [plateau.look(before * bad, before * bad) for _ in range(2)] == ["", "diverged"]
    plateau.begin(reduced=False)
    assert plateau.look(before * bad, before * bad) == ""
    plateau.begin(reduced=True)
    assert plateau.look(before * bad * bad, before * bad * bad, at_the_end=True) == "diverged"


def test_it_goes_on_from_its_state():
    values = [1.0, 0.8, 0.75, 3.0, 3.0, 0.7, 0.7, math.nan, 0.1]
    for cut in range(len(values)):
        plateau, whole = looks(values[:3])
        plateau.begin(reduced=True)
        whole += [plateau.look(v, v) for v in values[3:]]
        first, found = looks(values[: min(cut, 3)])
        parts, plateau = [first], first
        if cut >= 3:
            plateau.begin(reduced=True)
            found += [plateau.look(v, v) for v in values[3:cut]]
        again = Plateau("min", 0.1, 2, 2.0, 2)
        again.load_state_dict(parts[0].state_dict())
        for i in range(cut, len(values)):
            if i == 3:
                again.begin(reduced=True)
            found.append(again.look(values[i], values[i]))
        assert found == whole


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "least"}, "mode='least' is not known"),
        ({"divergence": 0.5}, "divergence=0.5 is not allowed; use a finite number of 1 or more"),
        ({"min_delta": -1}, "min_delta=-1"),
        ({"patience": 0}, "patience=0"),
        ({"recovery": 1.5}, "recovery=1.5"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        looks([], **settings)
