from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from loraplex.server.stop_strings import StopPatterns, StopScanner

TEXTS = st.text("abc", max_size=40)
STOPS = st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=4)


def naive(text: str, stops: list[str]) -> str | None:
    """The text before the stop string that is completed first, the longest of several; None if there is none."""
    for end in range(1, len(text) + 1):
        matched = [stop for stop in stops if text[:end].endswith(stop)]
        if matched:
            return text[: end - max(map(len, matched))]
    return None


def cut(text: str, places: list[int]) -> list[str]:
    bounds = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(bounds)]


def scan(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    scanner = StopScanner(StopPatterns(stops))
    out = ""
    for piece in pieces:
        out += scanner.feed(piece)
        if scanner.matched:
            return out[: -scanner.matched], True
    return out + scanner.finish(), False


@given(TEXTS, STOPS, st.lists(st.integers(0, 100), max_size=8))
def test_the_cut_of_the_text_into_pieces_does_not_matter(text: str, stops: list[str], places: list[int]) -> None:
    expected = naive(text, stops)
    assert scan(cut(text, places), stops) == (text if expected is None else expected, expected is not None)


@given(TEXTS, STOPS)
def test_only_what_may_begin_a_stop_string_is_held_back(text: str, stops: list[str]) -> None:
    scanner = StopScanner(StopPatterns(stops))
    for end, letter in enumerate(text, start=1):
        scanner.feed(letter)
        if scanner.matched:
            return
        begun = [k for stop in stops for k in range(1, len(stop)) if text[:end].endswith(stop[:k])]
        assert len(scanner.held) == max(begun, default=0)


def test_the_stop_string_completed_first_wins_over_the_one_begun_first() -> None:
    assert scan(["xab", "cd"], ["abcd", "bc"]) == ("xa", True)


def test_of_two_completed_together_the_longer_wins() -> None:
    assert scan(["x", "ab", "c"], ["bc", "abc"]) == ("x", True)


def test_an_unarmed_scanner_lets_a_whole_stop_string_through() -> None:
    scanner = StopScanner(StopPatterns(["END"]))
    assert scanner.feed("a END b", armed=False) == "a END b"
    assert scanner.feed("EN", armed=False) == ""
    assert scanner.feed("D!") == "END"
    assert scanner.matched == 3


def test_a_thousand_letters_of_almost_stop_strings_take_one_pass() -> None:
    scanner = StopScanner(StopPatterns(["a" * 1000 + "b"]))
    out = "".join(scanner.feed("a") for _ in range(20_000))
    assert len(out) == 19_000
    assert scanner.finish() == "a" * 1000
