from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from loraplex.server.detokenizer import ByteDetokenizer, Detokenizer, WindowDetokenizer
from loraplex.server.errors import InvalidRequestError
from loraplex.server.tokens import ChatOptions, TextTokenizer, load_tokenizer
from loraplex.server.vocabulary import vocabulary_of


def byte_level() -> Tokenizer:
    """Every byte, some merges across characters, special and added tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("ð", "Ł"), ("ðŁ", "ĺ")]
    vocab = {token: at for at, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in ("<|bos|>", "<|eos|>")])
    tokenizer.add_tokens([AddedToken("日本", normalized=False), AddedToken("plain added", normalized=False)])
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As Llama 2 has it: words with a mark for the space, bytes for the rest."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "é", "▁▁"]
    tokenizer = Tokenizer(
        models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[("▁", "a"), ("▁", "▁")], byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


BYTE_LEVEL, BYTE_FALLBACK = byte_level(), byte_fallback()
BYTE_LEVEL_VOCABULARY, BYTE_FALLBACK_VOCABULARY = vocabulary_of(BYTE_LEVEL), vocabulary_of(BYTE_FALLBACK)


def run(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    return [*map(detokenizer.push, ids), detokenizer.finish()]


@given(st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() + 3), max_size=60), st.booleans())
def test_pieces_of_random_byte_tokens_join_to_the_full_decode(ids: list[int], skip: bool) -> None:
    pieces = run(ByteDetokenizer(BYTE_LEVEL_VOCABULARY, skip_special=skip), ids)
    assert "".join(pieces) == BYTE_LEVEL.decode(ids, skip_special_tokens=skip)


@given(st.text(max_size=40))
def test_pieces_of_a_text_never_hold_half_a_character(text: str) -> None:
    pieces = run(ByteDetokenizer(BYTE_LEVEL_VOCABULARY), BYTE_LEVEL.encode(text).ids)
    assert "".join(pieces) == text
    assert sum(piece.count("\ufffd") for piece in pieces) == text.count("\ufffd")


@given(st.text("ab é😀日 ", max_size=30))
def test_byte_fallback_pieces_join_to_the_full_decode(text: str) -> None:
    ids = BYTE_FALLBACK.encode(text).ids
    pieces = run(ByteDetokenizer(BYTE_FALLBACK_VOCABULARY), ids)
    assert "".join(pieces) == BYTE_FALLBACK.decode(ids) == text


def test_an_emoji_of_four_tokens_comes_in_one_piece() -> None:
    ids = BYTE_FALLBACK.encode("😀").ids[-4:]
    assert run(ByteDetokenizer(BYTE_FALLBACK_VOCABULARY, at_start=False), ids) == ["", "", "", "😀", ""]


def test_half_a_character_at_the_end_becomes_one_replacement_character() -> None:
    detokenizer = ByteDetokenizer(BYTE_LEVEL_VOCABULARY)
    ids = BYTE_LEVEL.encode("😀").ids[:-1]
    assert [detokenizer.push(one) for one in ids] == [""] * len(ids)
    assert detokenizer.pending
    assert detokenizer.finish() == "\ufffd"


def test_a_continuation_keeps_the_space_that_a_text_of_its_own_drops() -> None:
    ids = [BYTE_FALLBACK.token_to_id("▁a"), BYTE_FALLBACK.token_to_id("b")]
    assert "".join(run(ByteDetokenizer(BYTE_FALLBACK_VOCABULARY, at_start=True), ids)) == "ab"
    assert "".join(run(ByteDetokenizer(BYTE_FALLBACK_VOCABULARY, at_start=False), ids)) == " ab"


def test_bytes_of_fallback_tokens_are_the_bytes_themselves() -> None:
    byte = BYTE_FALLBACK.token_to_id("<0xE2>")
    assert BYTE_FALLBACK_VOCABULARY.bytes_of[byte] == b"\xe2"
    assert BYTE_FALLBACK_VOCABULARY.text(byte) == "\ufffd"
    assert BYTE_FALLBACK_VOCABULARY.distinct_text(byte) == "bytes:\\xe2"


@given(st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() - 1), max_size=30))
def test_a_window_joins_valid_text_like_the_full_decode(ids: list[int]) -> None:
    text = BYTE_LEVEL.decode(ids).replace("\ufffd", "")
    pieces = run(WindowDetokenizer(BYTE_LEVEL.decode), BYTE_LEVEL.encode(text).ids)
    assert "".join(pieces) == text


def test_an_unknown_decoder_is_served_through_the_window() -> None:
    words = Tokenizer(models.WordPiece(vocab={"[UNK]": 0, "hel": 1, "##lo": 2, "you": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.decoder = decoders.WordPiece()
    tokenizer = TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=words))
    assert not tokenizer.vocabulary.exact
    assert tokenizer.decode([1, 2, 3, 1, 2]) == words.decode([1, 2, 3, 1, 2])


def test_the_table_of_a_metaspace_tokenizer_has_spaces() -> None:
    words = Tokenizer(models.BPE(vocab={"▁": 0, "a": 1, "▁a": 2}, merges=[("▁", "a")]))
    words.decoder = decoders.Metaspace()
    vocabulary = vocabulary_of(words)
    assert vocabulary.exact
    assert "".join(run(ByteDetokenizer(vocabulary), [2, 1, 2])) == words.decode([2, 1, 2])


def test_encoding_never_truncates_whatever_the_tokenizer_file_says(
    byte_tokenizer: Callable[..., PreTrainedTokenizerFast],
) -> None:
    fast = byte_tokenizer()
    fast.backend_tokenizer.enable_truncation(4)
    assert len(TextTokenizer(fast).encode("a long text")) == 11


def test_a_chat_is_tokenized_without_a_second_start_token(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode_chat([{"role": "user", "content": "hi"}], ChatOptions())
    assert ids.count(256) == 1
    assert tokenizer.decode(ids, skip_special=False) == "<|bos|><user>hi<|eos|><assistant>"


def test_template_variables_reach_the_template(tokenizer: TextTokenizer) -> None:
    options = ChatOptions(template_kwargs={"shout": "!"}, add_generation_prompt=False)
    assert tokenizer.render_chat([{"role": "user", "content": "hi"}], options).endswith("SHOUT!")


def test_a_continued_message_ends_the_prompt(tokenizer: TextTokenizer) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well"}]
    options = ChatOptions(add_generation_prompt=False, continue_final_message=True)
    assert tokenizer.render_chat(messages, options).endswith("<assistant>Well")


@pytest.mark.parametrize("name", ["tokenize", "chat_template", "messages", "tools"])
def test_names_of_the_renderer_are_no_template_variables(tokenizer: TextTokenizer, name: str) -> None:
    with pytest.raises(InvalidRequestError, match=name) as caught:
        tokenizer.render_chat([{"role": "user", "content": "hi"}], ChatOptions(template_kwargs={name: 1}))
    assert caught.value.param == "chat_template_kwargs"


def test_what_a_template_raises_is_the_clients_fault(tokenizer: TextTokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="no functions here"):
        tokenizer.render_chat([{"role": "function", "content": "x"}], ChatOptions())


def test_a_missing_template_is_named(byte_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> None:
    with pytest.raises(InvalidRequestError, match="no chat template"):
        TextTokenizer(byte_tokenizer(None)).render_chat([{"role": "user", "content": "x"}], ChatOptions())


def test_a_saved_tokenizer_is_loaded_with_its_template(
    tmp_path: Path, byte_tokenizer: Callable[..., PreTrainedTokenizerFast]
) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    loaded = load_tokenizer(tmp_path)
    ids: Any = loaded.encode_chat([{"role": "user", "content": "é😀"}], ChatOptions())
    assert loaded.decode(ids).startswith("<user>é😀<")
