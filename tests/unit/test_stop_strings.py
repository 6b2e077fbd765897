"""Stop strings: what is shown equals the cut of the whole text, however the text arrives."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import InvalidRequest
from shared.tokenizer.stop_strings import StopStrings

_TEXT = st.text(alphabet="ab\n😀", max_size=40)
_STOPS = st.lists(st.text(alphabet="ab\n😀", min_size=1, max_size=5), max_size=4)
_CUTS = st.lists(st.integers(0, 40), max_size=12)


def cut_by_hand(text: str, stops: list[str], include: bool = False) -> tuple[str, str | None]:
    """The slow definition: try every end from the left; the longest stop string that ends there cuts."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return (text[:end] if include else text[: end - len(stop)]), stop
    return text, None


def chunks_of(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


@settings(deadline=None)
@given(_TEXT, _STOPS, _CUTS, st.booleans())
def test_emission_equals_the_cut_of_the_whole_text_for_any_chunking(
    text: str, stops: list[str], cuts: list[int], include: bool
) -> None:
    scanner = StopStrings(stops, include_stop=include)
    shown = "".join(scanner.push(chunk)[0] for chunk in chunks_of(text, cuts)) + scanner.flush()
    assert (shown, scanner.stopped) == cut_by_hand(text, stops, include)


@settings(deadline=None)
@given(_TEXT, _STOPS, _CUTS)
def test_nothing_is_held_back_longer_than_needed(text: str, stops: list[str], cuts: list[int]) -> None:
    scanner = StopStrings(stops)
    seen = shown = ""
    for chunk in chunks_of(text, cuts):
        emit, stopped = scanner.push(chunk)
        if stopped is not None:
            break
        seen, shown = seen + chunk, shown + emit
        held = seen[len(shown) :]
        assert shown + held == seen
        longest = max((n for stop in stops for n in range(len(stop)) if seen.endswith(stop[:n])), default=0)
        assert len(held) == longest


def test_a_stop_over_several_tokens_is_never_partly_shown() -> None:
    scanner = StopStrings(["</answer>"])
    assert scanner.push("42 <") == ("42 ", None)
    assert scanner.push("/ans") == ("", None)
    assert scanner.push("wer> more") == ("", "</answer>")
    assert scanner.num_tokens == 3


def test_a_false_start_is_given_out_once_it_is_one() -> None:
    scanner = StopStrings(["abac"])
    assert scanner.push("aba") == ("", None)
    assert scanner.push("b") == ("ab", None)
    assert scanner.push("ac!") == ("", "abac")


def test_the_tokens_needed_stay_fixed_after_the_stop() -> None:
    scanner = StopStrings(["x"])
    for chunk in ("a", "b", "cxd", "e", "f"):
        scanner.push(chunk)
    assert scanner.num_tokens == 3
    assert scanner.push("x") == ("", "x")
    assert scanner.flush() == ""


def test_the_first_completed_stop_wins_over_an_earlier_start() -> None:
    scanner = StopStrings(["abcdef", "cd"])
    assert scanner.push("abcdef") == ("ab", "cd")


def test_of_two_ending_together_the_longer_one_cuts() -> None:
    scanner = StopStrings(["c", "abc"])
    assert scanner.push("xabc") == ("x", "abc")


def test_include_stop_keeps_the_stop_string() -> None:
    scanner = StopStrings(["END"], include_stop=True)
    assert scanner.push("the EN") == ("the ", None)
    assert scanner.push("D and") == ("END", "END")


def test_without_stop_strings_text_passes_through() -> None:
    scanner = StopStrings([])
    assert scanner.push("anything") == ("anything", None)
    assert scanner.flush() == ""


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="empty") as caught:
        StopStrings(["ok", ""])
    assert caught.value.param == "stop"
