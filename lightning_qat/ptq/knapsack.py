"""Choosing one option for each item so that costs add up to the least within a budget, exactly."""

from __future__ import annotations

from collections.abc import Sequence

#: Size and cost of an option.
Option = tuple[int, float]


def choose_one_each(items: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """Return the index of the option chosen for each item: the sum of costs is the least of all that fit.

    Partial choices are kept while no other one is as small and as good, and while a lower bound of what is left
    (Lagrangian relaxation) says that they may still beat the best choice known.

    Args:
        items: options of each item, sizes of at least 0 and finite costs.
        budget: most that the sizes of the chosen options may add up to.

    Raises:
        ValueError: if no choice fits.
    """
    smallest = [min(size for size, _ in options) for options in items]
    left = sum(smallest)
    if left > budget:
        raise ValueError(f"budget={budget} is too small: the smallest options take {left}")
    price = _best_price(items, budget)
    # The cost of the items from here on, less what their size is worth: a lower bound with any price.
    rest = [0.0] * (len(items) + 1)
    for i in range(len(items) - 1, -1, -1):
        rest[i] = rest[i + 1] + min(cost + price * size for size, cost in items[i])
    known = _cost_of_some_choice(items, budget, price)
    # What the terms of the bound, far larger than their difference at times, may be rounded by.
    slack = 1e-12 * (abs(known) + abs(rest[0]) + price * budget + 1e-300)
    states: list[tuple[int, float, tuple[int, int] | None, int]] = [(0, 0.0, None, -1)]
    history: list[list[tuple[int, int]]] = []
    for i, options in enumerate(items):
        left -= smallest[i]
        grown = []
        for at, (size, cost, _, _) in enumerate(states):
            for index, (more, added) in enumerate(options):
                total, sum_ = size + more, cost + added
                if total + left <= budget and sum_ + rest[i + 1] - price * (budget - total) <= known + slack:
                    grown.append((total, sum_, (at, index), i))
        grown.sort(key=lambda state: (state[0], state[1]))
        states, best = [], float("inf")
        for state in grown:
            if state[1] < best:
                states.append(state)
                best = state[1]
        history.append([state[2] for state in states if state[2] is not None])
    at = min(range(len(states)), key=lambda j: states[j][1]) if items else 0
    chosen: list[int] = []
    for steps in reversed(history):
        at, index = steps[at]
        chosen.append(index)
    return chosen[::-1]


def _sizes_at(items: Sequence[Sequence[Option]], price: float) -> tuple[int, float]:
    """Return size and cost of the choice that is best where size costs ``price``; of equal ones the smallest."""
    chosen = [min(options, key=lambda o: (o[1] + price * o[0], o[0])) for options in items]
    return sum(size for size, _ in chosen), sum(cost for _, cost in chosen)


def _best_price(items: Sequence[Sequence[Option]], budget: int) -> float:
    """Return about the lowest price of size at which the best choice fits the budget."""
    if _sizes_at(items, 0.0)[0] <= budget:
        return 0.0
    low, high = 0.0, 1e-30
    while _sizes_at(items, high)[0] > budget:
        low, high = high, high * 4
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if _sizes_at(items, middle)[0] <= budget else (middle, high)
    return high


def _cost_of_some_choice(items: Sequence[Sequence[Option]], budget: int, price: float) -> float:
    """Return the cost of a choice that fits: the best at the price, with what is left of the budget spent greedily."""
    chosen = [min(options, key=lambda o: (o[1] + price * o[0], o[0])) for options in items]
    size = sum(s for s, _ in chosen)
    if size > budget:  # rounding of the price
        chosen = [min(options) for options in items]
        size = sum(s for s, _ in chosen)
    for i, options in enumerate(items):
        fitting = [o for o in options if size - chosen[i][0] + o[0] <= budget]
        better = min(fitting, key=lambda o: (o[1], o[0]))
        if better[1] < chosen[i][1]:
            size, chosen[i] = size - chosen[i][0] + better[0], better
    return sum(cost for _, cost in chosen)
