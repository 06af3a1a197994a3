"""Text out of tokens, against ``tokenizer.decode`` of the whole answer."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from unittest.mock import Mock, call

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from embedwire.engines.transformers.detokenize import Detokenizer, StopStrings, Vocabulary
from embedwire.errors import ConfigurationError

TEXT = "Grüße, 世界! 👩‍👩‍👧‍👦 e\u0301 \x00\n\t end"


@cache
def byte_level() -> PreTrainedTokenizerFast:
    """One token a byte, a special and an ordinary added token: every character is split."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: n for n, token in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    tokenizer.add_tokens([AddedToken("<世>", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


@cache
def sentence_piece() -> PreTrainedTokenizerFast:
    """The decoder of Llama 2: pieces with U+2581 for a space, and one token a byte for the rest."""
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁hello", "▁", "wor", "ld", "世"]
    vocabulary = {token: n for n, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def pieces(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(Vocabulary(tokenizer.backend_tokenizer))
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


def test_no_piece_holds_a_broken_character() -> None:
    ids = byte_level().encode(TEXT, add_special_tokens=False)
    assert len(ids) == len(TEXT.encode()), "the test needs a token a byte"
    shown = pieces(byte_level(), ids)
    assert "".join(shown) == TEXT
    assert not any("\ufffd" in piece for piece in shown)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 259), max_size=24))
def test_any_bytes_read_as_decode_reads_them(ids: list[int]) -> None:
    """Also bytes that are no UTF-8, cut anywhere, and the added tokens between them."""
    assert "".join(pieces(byte_level(), ids)) == byte_level().decode(ids, skip_special_tokens=True)


@given(st.lists(st.sampled_from(["▁hello", "▁", "wor", "ld", "世", "<0xE4>", "</s>"]), max_size=12))
def test_sentence_pieces_read_as_decode_reads_them(tokens: list[str]) -> None:
    """Bytes only as whole characters: on broken ones the two count U+FFFD differently."""
    whole = [
        t for token in tokens for t in (["<0xE4>", "<0xB8>", "<0x96>"] if token == "<0xE4>" else [token])
    ]
    ids = sentence_piece().convert_tokens_to_ids(whole)
    assert "".join(pieces(sentence_piece(), ids)) == sentence_piece().decode(ids, skip_special_tokens=True)


def test_ids_beyond_the_tokenizer_are_silent() -> None:
    assert pieces(byte_level(), [len(byte_level()), 10**6]) == ["", "", ""]


def test_a_token_is_looked_up_once_however_long_the_answer_is() -> None:
    """The work a token costs does not grow with what was said before: nothing is decoded again."""
    tokenizer = Mock(wraps=byte_level().backend_tokenizer, decoder=decoders.ByteLevel())
    detokenizer = Detokenizer(Vocabulary(tokenizer))
    assert len("".join(map(detokenizer.push, [64, 65] * 500))) == 1000
    assert tokenizer.id_to_token.mock_calls == [call(64), call(65)]
    tokenizer.decode.assert_not_called()


def test_an_unknown_decoder_is_refused() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(ConfigurationError, match="WordPiece"):
        Vocabulary(tokenizer)


def shown_until_stop(stops: list[str], parts: list[str]) -> tuple[str, bool]:
    filter_ = StopStrings(stops)
    shown = ""
    for part in parts:
        text, stopped = filter_.push(part)
        shown += text
        if stopped:
            return shown, True
    return shown + filter_.flush(), False


@pytest.mark.parametrize(
    ("stops", "parts", "expected"),
    [
        (["END"], ["say E", "N", "D and more"], ("say ", True)),
        (["END"], ["say E", "N", "d"], ("say ENd", False)),
        (["END"], ["say EN"], ("say EN", False)),
        (["aab"], ["aa", "a", "b"], ("a", True)),
        (["abcd", "bc"], ["ab", "c"], ("a", True)),
        (["abcd", "bc"], ["abcd"], ("a", True)),
        (["bc", "abc"], ["ab", "c"], ("", True)),
        ([], ["a", "b"], ("ab", False)),
    ],
)
def test_stops_across_token_borders(stops: list[str], parts: list[str], expected: tuple[str, bool]) -> None:
    assert shown_until_stop(stops, parts) == expected


@given(
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.text("ab", max_size=30),
    st.lists(st.integers(0, 30), max_size=8),
)
def test_what_is_shown_does_not_depend_on_the_cuts(stops: list[str], text: str, cuts: list[int]) -> None:
    borders = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    parts = [text[a:b] for a, b in pairwise(borders)]
    assert shown_until_stop(stops, parts) == shown_until_stop(stops, list(text))


@given(st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3), st.text("abc", max_size=30))
def test_only_a_possible_stop_is_held_back(stops: list[str], text: str) -> None:
    filter_ = StopStrings(stops)
    shown = ""
    for n, character in enumerate(text, start=1):
        piece, stopped = filter_.push(character)
        shown += piece
        if stopped:
            return
        held = text[len(shown) : n]
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)
