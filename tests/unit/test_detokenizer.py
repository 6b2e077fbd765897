"""Incremental detokenization: the pieces joined are the whole text, and no broken character is ever shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from shared.errors import ModelFormatError
from shared.tokenizer.codec import TextCodec
from shared.tokenizer.detokenizer import ChoiceText, Detokenizer
from shared.tokenizer.stop_strings import StopStrings
from tests.text_models import CONTROL, byte_level_tokenizer, metaspace_tokenizer, sentencepiece_tokenizer, token_id

FAMILIES: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": byte_level_tokenizer,
    "sentencepiece": sentencepiece_tokenizer,
    "metaspace_first": metaspace_tokenizer,
    "metaspace_never": lambda: metaspace_tokenizer("never"),
}
_IDS = st.lists(st.integers(0, 460), max_size=60)
_SIZES = st.lists(st.integers(0, 5), max_size=30)


@lru_cache
def family(name: str) -> tuple[Tokenizer, TextCodec]:
    """The tokenizer as a reference, and the codec over an equal one."""
    tokenizer = FAMILIES[name]()
    return tokenizer, TextCodec(Tokenizer.from_str(tokenizer.to_str()))


def stream(detokenizer: Detokenizer, ids: Sequence[int], sizes: Sequence[int]) -> list[str]:
    """Push the ids in the given chunk sizes, then the rest; the pieces that came out."""
    pieces, rest = [], list(ids)
    for size in sizes:
        pieces.append(detokenizer.push(rest[:size]))
        rest = rest[size:]
    return [*pieces, detokenizer.push(rest), detokenizer.flush()]


@settings(deadline=None)
@given(_IDS, _SIZES, st.booleans())
def test_byte_level_pieces_equal_the_full_decode_of_any_ids(ids: list[int], sizes: list[int], skip: bool) -> None:
    reference, codec = family("byte_level")
    pieces = stream(Detokenizer(codec, skip_special=skip), ids, sizes)
    assert "".join(pieces) == reference.decode(ids, skip_special_tokens=skip) == codec.decode(ids, skip_special=skip)


@pytest.mark.parametrize("name", sorted(FAMILIES))
@settings(deadline=None)
@given(text=st.text(max_size=40), sizes=_SIZES)
def test_pieces_of_encoded_text_equal_the_full_decode(name: str, text: str, sizes: list[int]) -> None:
    reference, codec = family(name)
    ids = reference.encode(text, add_special_tokens=False).ids
    pieces = stream(Detokenizer(codec), ids, sizes)
    assert "".join(pieces) == reference.decode(ids)


@pytest.mark.parametrize("name", sorted(FAMILIES))
@settings(deadline=None)
@given(ids=_IDS, sizes=_SIZES)
def test_any_split_gives_the_same_text(name: str, ids: list[int], sizes: list[int]) -> None:
    _, codec = family(name)
    assert "".join(stream(Detokenizer(codec), ids, sizes)) == codec.decode(ids)


def test_an_emoji_over_several_tokens_appears_once_and_whole() -> None:
    reference, codec = family("byte_level")
    ids = reference.encode("a 🧪!").ids
    detokenizer = Detokenizer(codec)
    pieces = [detokenizer.push([token]) for token in ids]
    assert len(reference.encode("🧪").ids) > 1
    assert all("\ufffd" not in piece for piece in pieces)
    assert [piece for piece in pieces if "🧪" in piece] == ["🧪"]
    assert "".join(pieces) == "a 🧪!"


def test_an_unfinished_character_is_shown_as_broken_only_at_the_end() -> None:
    reference, codec = family("byte_level")
    first_byte = reference.encode("🧪").ids[0]
    detokenizer = Detokenizer(codec)
    assert detokenizer.push([first_byte]) == ""
    assert detokenizer.flush() == "\ufffd"


def test_bytes_that_can_never_be_a_character_are_replaced_at_once() -> None:
    reference, codec = family("byte_level")
    emoji, letter = reference.encode("🧪").ids[0], reference.encode("a").ids[0]
    assert Detokenizer(codec).push([emoji, letter]) == "\ufffda"


def test_byte_fallback_shows_whole_characters_next_to_broken_ones() -> None:
    reference, codec = family("sentencepiece")
    ids = [token_id(reference, f"<0x{byte:02X}>") for byte in (*"é".encode(), 0xFF, *"ß".encode())]
    assert codec.decode(ids) == "é\ufffdß"


def test_sentencepiece_drops_the_first_space_unless_the_text_continues_another() -> None:
    reference, codec = family("sentencepiece")
    ids = reference.encode("the dog").ids
    assert "".join(stream(Detokenizer(codec), ids, [1, 1, 1])) == "the dog"
    assert "".join(stream(Detokenizer(codec, continuation=True), ids, [1, 1, 1])) == " the dog"


def test_control_tokens_are_left_out_or_spelled() -> None:
    reference, codec = family("byte_level")
    end = token_id(reference, CONTROL[2])
    assert codec.is_special(end)
    assert codec.decode([end]) == ""
    assert codec.decode([end], skip_special=False) == CONTROL[2]


@pytest.mark.parametrize("token", [-1, 100_000, 2**40])
def test_ids_outside_the_vocabulary_are_no_text(token: int) -> None:
    _, codec = family("byte_level")
    assert codec.decode([token]) == ""
    assert codec.token_bytes(token) == b""


def test_token_bytes_join_to_the_text_and_token_text_marks_partial_ones() -> None:
    reference, codec = family("byte_level")
    ids = reference.encode("naïve 🧪").ids
    assert b"".join(map(codec.token_bytes, ids)).decode() == "naïve 🧪"
    assert codec.token_text(reference.encode("🧪").ids[0]) == "\ufffd"


def test_a_decoder_of_another_family_is_refused_by_name() -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(ModelFormatError, match="WordPiece"):
        TextCodec(tokenizer)


def test_a_tokenizer_without_decoder_is_refused() -> None:
    with pytest.raises(ModelFormatError, match="no decoder"):
        TextCodec(Tokenizer(models.BPE(vocab={"a": 0}, merges=[])))


def choice(stops: Sequence[str]) -> tuple[Tokenizer, ChoiceText]:
    reference, codec = family("byte_level")
    return reference, ChoiceText(Detokenizer(codec), StopStrings(stops))


def test_the_token_that_completes_a_stop_is_counted_exactly() -> None:
    reference, text = choice(["dog"])
    ids = reference.encode("The dog, and then").ids
    needed = next(n for n in range(len(ids)) if "dog" in reference.decode(ids[:n]))
    delta = text.push(ids)
    assert (delta.text, delta.num_tokens, delta.stopped) == ("The ", needed, "dog")
    assert text.push(ids).text == ""
    assert text.flush().num_tokens == needed


def test_flush_gives_out_what_stop_strings_and_characters_held_back() -> None:
    reference, text = choice(["dogs"])
    ids = reference.encode("dog").ids
    assert text.push(ids).text == ""
    assert text.flush().text == "dog"
    _, text = choice(["\ufffd"])
    assert text.push(reference.encode("🧪").ids[:1]).text == ""
    assert text.flush().stopped == "\ufffd"
