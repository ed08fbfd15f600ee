from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from loraplex.server.choice_text import ChoiceText, Delta
from loraplex.server.generation_job import TextOptions
from loraplex.server.messages import TokenLogprob, TokenOutput
from loraplex.server.stop_strings import StopPatterns
from loraplex.server.tokens import TextTokenizer

EOS = 257


def run(
    tokenizer: TextTokenizer, ids: list[int], reason: Any = "length", chunk: int = 1, **options: Any
) -> list[Delta]:
    stop = options.pop("stop", None)
    text_options = TextOptions(stop=StopPatterns(stop) if stop else None, **options)
    choice = ChoiceText(0, tokenizer.detokenizer(skip_special=text_options.skip_special), text_options)
    deltas = []
    for at in range(0, len(ids), chunk):
        piece = ids[at : at + chunk]
        output = TokenOutput(
            request_id="r",
            index=0,
            token_ids=piece,
            logprobs=[TokenLogprob(one, -1.0) for one in piece],
            finish_reason=reason if at + chunk >= len(ids) else None,
        )
        delta = choice.accept(output)
        if delta is not None:
            deltas.append(delta)
        if choice.ended:
            break
    return deltas


def text_of(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def entries_of(deltas: list[Delta]) -> list[int]:
    return [entry.token_id for delta in deltas for entry in delta.entries]


def test_every_token_is_a_delta_of_its_own(tokenizer: TextTokenizer) -> None:
    deltas = run(tokenizer, tokenizer.encode("abc"))
    assert [(delta.text, delta.num_tokens, delta.finish_reason) for delta in deltas] == [
        ("a", 1, None),
        ("b", 1, None),
        ("c", 1, "length"),
    ]


def test_an_interval_waits_after_the_first_token_but_not_with_the_end(tokenizer: TextTokenizer) -> None:
    assert [delta.text for delta in run(tokenizer, tokenizer.encode("abcdefgh"), interval=3)] == [
        "a",
        "bcd",
        "efg",
        "h",
    ]


def test_a_stop_string_across_tokens_is_cut_and_what_follows_is_dropped(tokenizer: TextTokenizer) -> None:
    deltas = run(tokenizer, tokenizer.encode("one STOP two"), stop=["STOP"])
    assert text_of(deltas) == "one "
    assert deltas[-1].finish_reason == "stop"
    assert sum(delta.num_tokens for delta in deltas) == 8


def test_tokens_behind_a_stop_string_in_the_same_output_are_not_counted(tokenizer: TextTokenizer) -> None:
    deltas = run(tokenizer, tokenizer.encode("a.bcdef"), stop=["."], chunk=7)
    assert text_of(deltas) == "a"
    assert sum(delta.num_tokens for delta in deltas) == 2


def test_the_stop_string_stays_where_asked(tokenizer: TextTokenizer) -> None:
    deltas = run(tokenizer, tokenizer.encode("one STOP two"), stop=["STOP"], keep_stop=True)
    assert text_of(deltas) == "one STOP"
    assert entries_of(deltas) == tokenizer.encode("one STOP")


def test_entries_of_cut_tokens_are_dropped_and_all_others_come_in_order(tokenizer: TextTokenizer) -> None:
    deltas = run(tokenizer, tokenizer.encode("one STOP two"), stop=["STOP"])
    assert entries_of(deltas) == tokenizer.encode("one ")


def test_an_entry_comes_with_the_first_character_of_its_token(tokenizer: TextTokenizer) -> None:
    deltas = run(tokenizer, tokenizer.encode("aSTx😀"), stop=["STOP"])
    assert [(delta.text, len(delta.entries)) for delta in deltas] == [
        ("a", 1),
        ("", 0),
        ("", 0),
        ("STx", 3),
        ("", 0),
        ("", 0),
        ("", 0),
        ("😀", 4),
    ]
    offsets = [entry.offset for delta in deltas for entry in delta.entries]
    assert offsets == [0, 1, 2, 3, 4, 4, 4, 4]


def test_what_was_held_back_comes_with_the_end(tokenizer: TextTokenizer) -> None:
    deltas = run(tokenizer, tokenizer.encode("a ST"), stop=["STOP"])
    assert text_of(deltas) == "a ST"
    assert len(entries_of(deltas)) == 4


def test_half_a_character_at_the_end_may_complete_no_stop_string(tokenizer: TextTokenizer) -> None:
    deltas = run(tokenizer, tokenizer.encode("a😀")[:-1], stop=["\ufffd"])
    assert (text_of(deltas), deltas[-1].finish_reason) == ("a", "stop")


def test_stop_strings_wait_for_min_tokens(tokenizer: TextTokenizer) -> None:
    deltas = run(tokenizer, tokenizer.encode("a.b.c.d"), stop=["."], min_tokens=3)
    assert text_of(deltas) == "a.b"


def test_the_end_token_has_an_entry_but_no_text(tokenizer: TextTokenizer) -> None:
    deltas = run(tokenizer, [*tokenizer.encode("ab"), EOS], "stop", skip_special=False)
    assert (text_of(deltas), entries_of(deltas)[-1], deltas[-1].finish_reason) == ("ab", EOS, "stop")


def test_the_end_token_is_text_where_stop_and_special_tokens_are_asked_for(tokenizer: TextTokenizer) -> None:
    deltas = run(tokenizer, [*tokenizer.encode("ab"), EOS], "stop", skip_special=False, keep_stop=True)
    assert text_of(deltas) == "ab<|eos|>"


def test_an_output_without_tokens_ends_a_choice(tokenizer: TextTokenizer) -> None:
    choice = ChoiceText(0, tokenizer.detokenizer(), TextOptions())
    delta = choice.accept(TokenOutput(request_id="r", index=0, token_ids=[], finish_reason="length"))
    assert delta is not None
    assert (delta.text, delta.finish_reason, choice.num_tokens) == ("", "length", 0)


@given(
    ids=st.lists(st.integers(0, 255), min_size=1, max_size=40),
    chunk=st.integers(1, 5),
    interval=st.integers(1, 5),
)
def test_any_chunking_gives_the_same_text_and_entries(
    tokenizer: TextTokenizer, ids: list[int], chunk: int, interval: int
) -> None:
    deltas = run(tokenizer, ids, chunk=chunk, interval=interval)
    assert text_of(deltas) == tokenizer.decode(ids)
    assert entries_of(deltas) == ids
