from __future__ import annotations

import math
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex.memory.arrival_rates import NEVER, ArrivalRates, worth_of


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def rates(clock: Clock) -> ArrivalRates:
    return ArrivalRates(100.0, max_keys=3, clock=clock)


def test_what_was_never_wanted_has_no_rate(rates: ArrivalRates) -> None:
    assert rates.log_weight("a") == NEVER
    assert rates.rate("a") == 0.0
    assert worth_of(1.0, NEVER, 1) == NEVER


def test_the_rate_of_what_comes_evenly_is_found_and_decays(clock: Clock, rates: ArrivalRates) -> None:
    for _ in range(2000):
        clock.now += 0.5
        rates.note("a")
    assert rates.rate("a") == pytest.approx(2.0, rel=0.01)
    clock.now += 100
    assert rates.rate("a") == pytest.approx(2.0 / math.e, rel=0.01)


def test_weights_keep_their_order_and_distance_as_time_goes_by(clock: Clock, rates: ArrivalRates) -> None:
    rates.note("a")
    rates.note("a")
    rates.note("b")
    before = rates.log_weight("a") - rates.log_weight("b")
    clock.now += 1e9
    assert rates.log_weight("a") - rates.log_weight("b") == before == pytest.approx(math.log(2))
    rates.note("b")
    assert rates.log_weight("b") > rates.log_weight("a")


@given(gaps=st.lists(st.floats(0, 300), min_size=1, max_size=30))
def test_a_weight_is_the_sum_over_its_arrivals(gaps: list[float]) -> None:
    clock = Clock()
    rates = ArrivalRates(50.0, clock=clock)
    times = []
    for gap in gaps:
        clock.now += gap
        rates.note("a")
        times.append(clock.now)
    expected = sum(math.exp((time - clock.now) / 50) for time in times) / 50
    assert rates.rate("a") == pytest.approx(expected)


def test_a_weight_of_ones_own_counts_as_a_noted_one_does(clock: Clock, rates: ArrivalRates) -> None:
    own = NEVER
    for gap in (1, 7, 200):
        clock.now += gap
        rates.note("a")
        own = rates.one_more(own)
    assert own == rates.log_weight("a")


def test_what_has_not_come_for_longest_is_forgotten_beyond_the_bound(clock: Clock, rates: ArrivalRates) -> None:
    for key in "abacd":
        clock.now += 1
        rates.note(key)
    assert rates.rate("b") == 0.0
    assert set(rates.most_wanted(10)) == set("acd")


def test_the_most_wanted_come_first(clock: Clock, rates: ArrivalRates) -> None:
    for key in "abcbcc":
        clock.now += 1
        rates.note(key)
    assert rates.most_wanted(2) == ["c", "b"]
    assert rates.most_wanted(0) == []


def test_the_most_wanted_may_be_asked_for_while_others_come() -> None:
    rates = ArrivalRates(max_keys=500)
    done = threading.Event()

    def note() -> None:
        for at in range(30_000):
            rates.note(at)
        done.set()

    thread = threading.Thread(target=note)
    thread.start()
    while not done.is_set():
        assert len(rates.most_wanted(5)) <= 5
    thread.join()


def test_worth_grows_with_cost_and_weight_and_falls_with_size() -> None:
    assert worth_of(2.0, 0.0, 1) - worth_of(1.0, 0.0, 1) == pytest.approx(math.log(2))
    assert worth_of(1.0, 0.0, 4) - worth_of(1.0, 0.0, 1) == pytest.approx(-math.log(4))
    assert worth_of(1.0, 3.0, 1) == 3.0


def test_a_cost_that_was_measured_as_nothing_is_worth_little_and_no_fault() -> None:
    assert NEVER < worth_of(0.0, 0.0, 10) < worth_of(1e-6, 0.0, 10)
