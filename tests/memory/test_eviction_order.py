from __future__ import annotations

from collections.abc import Hashable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from loraplex.memory.eviction_order import EvictionOrder, LruOrder, ValueOrder


class Owner:
    def __init__(self) -> None:
        self.gone: list[Hashable] = []

    def put_out(self, key: Hashable) -> None:
        self.gone.append(key)


@pytest.fixture
def owner() -> Owner:
    return Owner()


ORDERS = [LruOrder, ValueOrder]


@pytest.mark.parametrize("make", ORDERS)
def test_an_order_sums_sizes_and_tells_the_owner(make: type[LruOrder | ValueOrder], owner: Owner) -> None:
    order = make()
    for key, size in (("a", 3), (b"b", 1), ("c", 2)):
        order.add(key, size, owner, 0.0)
    assert order.size == 6
    assert order.put_out_first() == "a"
    assert owner.gone == ["a"]
    order.discard("c")
    assert (order.keys, order.size) == ((b"b",), 1)
    assert b"b" in order
    assert "c" not in order
    order.put_out_first()
    assert (order.keys, order.size) == ((), 0)


@pytest.mark.parametrize("make", ORDERS)
def test_a_key_is_there_once_or_not_at_all(make: type[LruOrder | ValueOrder], owner: Owner) -> None:
    order = make()
    order.add("a", 1, owner, 0.0)
    with pytest.raises(AssertionError, match="'a' is here already"):
        order.add("a", 1, owner, 1.0)
    for verb in (order.discard, lambda key: order.revalue(key, 1.0)):
        with pytest.raises(KeyError):
            verb("b")


def test_the_least_recently_used_goes_first_whatever_it_is_worth(owner: Owner) -> None:
    order = LruOrder()
    for key, worth in (("a", 3.0), ("b", 1.0), ("c", 2.0)):
        order.add(key, 1, owner, worth)
    order.revalue("c", -1.0)
    assert order.keys == ("a", "b", "c")
    assert order.least_worth == float("-inf")


def test_the_least_worth_goes_first_and_among_equals_the_one_that_came_first(owner: Owner) -> None:
    order = ValueOrder()
    assert order.least_worth == float("inf")
    for key, worth in (("a", 2.0), ("b", 1.0), ("c", 1.0), ("d", float("-inf"))):
        order.add(key, 1, owner, worth)
    assert order.keys == ("d", "b", "c", "a")
    order.discard("d")
    assert order.least_worth == 1.0
    order.discard("b")
    order.add("b", 1, owner, 1.0)
    assert [order.put_out_first() for _ in range(3)] == ["c", "b", "a"]


def test_another_worth_moves_a_thing_but_keeps_its_place_among_equals(owner: Owner) -> None:
    order = ValueOrder()
    for key in "abc":
        order.add(key, 1, owner, 1.0)
    order.revalue("a", 5.0)
    assert order.keys == ("b", "c", "a")
    order.revalue("a", 1.0)
    assert [order.put_out_first() for _ in range(3)] == ["a", "b", "c"]


def test_things_that_come_and_go_leave_no_heap_behind(owner: Owner) -> None:
    order = ValueOrder()
    for at in range(10):
        order.add(at, 1, owner, float(at))
    for at in range(10_000):
        order.discard(at % 10)
        order.add(at % 10, 1, owner, float(at))
        order.revalue(at % 10, float(at) + 0.5)
    assert len(order._heap) <= 2 * 10 + 65
    assert order.keys == tuple(range(10))


class OrderMachine(RuleBasedStateMachine):
    """An order against a list that is sorted whenever somebody asks."""

    names = st.sampled_from("abcdefgh")
    worths = st.sampled_from([float("-inf"), -1.0, 0.0, 0.5, 3.0])

    def __init__(self) -> None:
        super().__init__()
        self.owner = Owner()
        self.model: list[tuple[str, int, float]] = []  # in the order of coming

    @initialize(by_value=st.booleans())
    def choose(self, by_value: bool) -> None:
        self.by_value = by_value
        self.order: EvictionOrder = ValueOrder() if by_value else LruOrder()

    def _sorted(self) -> list[tuple[str, int, float]]:
        return sorted(self.model, key=lambda thing: thing[2]) if self.by_value else self.model

    def _at(self, name: str) -> int | None:
        return next((at for at, thing in enumerate(self.model) if thing[0] == name), None)

    @rule(name=names, size=st.integers(1, 9), worth=worths)
    def add_or_discard(self, name: str, size: int, worth: float) -> None:
        at = self._at(name)
        if at is not None:
            self.order.discard(name)
            del self.model[at]
        else:
            self.order.add(name, size, self.owner, worth)
            self.model.append((name, size, worth))

    @rule(name=names, worth=worths)
    def revalue(self, name: str, worth: float) -> None:
        at = self._at(name)
        if at is not None:
            self.order.revalue(name, worth)
            self.model[at] = (*self.model[at][:2], worth)

    @precondition(lambda self: self.model)
    @rule()
    def put_out_first(self) -> None:
        first = self._sorted()[0]
        assert self.order.least_worth == (first[2] if self.by_value else float("-inf"))
        assert self.order.put_out_first() == first[0] == self.owner.gone[-1]
        self.model.remove(first)

    @invariant()
    def order_agrees_with_the_model(self) -> None:
        if hasattr(self, "order"):
            assert self.order.keys == tuple(thing[0] for thing in self._sorted())
            assert self.order.size == sum(thing[1] for thing in self.model)
            assert all((name in self.order) == (self._at(name) is not None) for name in "abcdefgh")


TestOrderMachine = OrderMachine.TestCase
TestOrderMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
