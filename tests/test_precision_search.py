"""The precision search on losses that are known."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comask.calib.precision_search import Search
from comask.errors import PrecisionError

amounts = st.floats(0, 1, allow_subnormal=False)


@given(st.lists(st.tuples(amounts, amounts), min_size=1, max_size=60), st.floats(0, 5), st.data())
def test_the_budget_is_kept_with_few_trials(
    layers: list[tuple[float, float]], budget: float, data: st.DataObject
) -> None:
    """Each int8 layer loses its own share; the order that the search is given may be wrong."""
    losses = {f"layer{i}": loss for i, (loss, _) in enumerate(layers)}
    cost = {f"layer{i}": price for i, (_, price) in enumerate(layers)}
    misjudged = data.draw(st.lists(amounts, min_size=len(layers), max_size=len(layers)))
    order = dict(zip(losses, misjudged, strict=True))

    def loss(kept: frozenset[str]) -> float:
        return math.fsum(share for name, share in losses.items() if name not in kept)

    search = Search(loss, budget)
    if search.try_all_int8():
        assert loss(frozenset()) <= budget
        return
    kept = search.run(order, cost)
    assert loss(kept) <= budget
    assert kept in {trial.float_layers for trial in search.trials}
    assert len(search.trials) <= 3 + 2 * math.ceil(math.log2(len(layers) + 1)) + 6


@given(st.lists(st.integers(0, 40), min_size=2, max_size=40), st.integers(0, 400))
def test_with_the_true_order_no_kept_layer_is_surplus(shares: list[int], budget: int) -> None:
    losses = {f"layer{i:02}": share for i, share in enumerate(shares)}

    def loss(kept: frozenset[str]) -> float:
        return float(sum(share for name, share in losses.items() if name not in kept))

    search = Search(loss, budget)
    if search.try_all_int8():
        return
    kept = search.run(losses, dict.fromkeys(losses, 1.0), sent_back=len(losses))
    for name in kept:
        assert loss(kept - {name}) > budget


def test_the_dearest_layers_are_sent_back_first() -> None:
    losses = {"a": 5.0, "b": 4.0, "c": 3.0, "d": 0.0}
    search = Search(lambda kept: 12.0 - sum(losses[n] for n in kept), 5.0)
    assert not search.try_all_int8()
    # a + b leave 3; b could not have stayed int8, and neither a: 12 - 4 = 8
    assert search.run(losses, {"a": 1.0, "b": 9.0, "c": 1.0, "d": 1.0}) == {"a", "b"}
    search = Search(lambda kept: 0.0 if "b" in kept else 9.0, 1.0)
    assert search.run(losses, {"a": 9.0, "b": 1.0, "c": 1.0, "d": 1.0}) == {"b"}


def test_a_budget_that_nothing_meets_is_refused() -> None:
    search = Search(lambda kept: 1.5 - 0.1 * len(kept), 0.3)
    assert not search.try_all_int8()
    with pytest.raises(
        PrecisionError, match=r"--max-loss 0\.3 cannot be met: .* expected loss is 1\.30 AP points"
    ):
        search.run({"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 1.0})
