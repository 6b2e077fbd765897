"""From journal entries to deltas: stop tokens, stop strings, counts, several jobs, failure."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.gateway.choices import ChoiceOutput, Delta, TextRules
from services.gateway.errors import GenerationFailed
from services.gateway.generation import MAX_AT_ONCE, Generation, submitted
from services.gateway.metering import TokenMeter
from services.gateway.metrics import GatewayMetrics
from shared.protocol.journal import chain
from shared.protocol.messages import End, Job, TokenLogprob, Tokens, Usage
from shared.protocol.position import START, Position, Standing
from shared.protocol.sampling import SamplingParams
from shared.tokenizer.detokenizer import ChoiceText, Detokenizer
from shared.tokenizer.stop_strings import StopStrings
from tests.gateway_rig import CODEC, EOS


def make_rules(stops: tuple[str, ...] = (), **changes: Any) -> TextRules:
    include = bool(changes.get("include_stop"))
    fields: dict[str, Any] = {
        **{"eos_ids": frozenset({EOS}), "include_stop": False, "wants_every_token": False, "scores_only": False},
        "new_text": lambda: ChoiceText(Detokenizer(CODEC, continuation=True), StopStrings(stops, include_stop=include)),
    }
    return TextRules(**fields | changes)


def make_job(n: int = 1, request_id: str = "r", stop_ids: tuple[int, ...] = (EOS,)) -> Job:
    return Job(request_id, "m", (1, 2, 3), SamplingParams(max_tokens=50, seed=1, n=n, stop_ids=stop_ids), "g", "p", "d")


def entries(text: str, *, choice: int = 0, finish: str | None = None, last: tuple[int, ...] = ()) -> list[Tokens]:
    """One entry a token, as decode sends them."""
    ids = [*CODEC.encode(text), *last]
    events = []
    for base, token in enumerate(ids):
        h = chain("", ids[:base])
        ends = finish if base == len(ids) - 1 else None
        events.append(Tokens(choice, base, h, chain(h, [token]), (token,), finish=ends))
    return events


def push_all(choice: ChoiceOutput, events: list[Tokens]) -> list[Delta]:
    deltas = (choice.push(event, f"1-{number}") for number, event in enumerate(events, 1))
    return [delta for delta in deltas if delta is not None]


def text_of(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def test_the_end_of_sequence_is_counted_and_not_shown() -> None:
    choice = ChoiceOutput(0, make_job(), make_rules())
    deltas = push_all(choice, entries("Hello there", finish="stop", last=(EOS,)))
    assert text_of(deltas) == "Hello there"
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", None)
    assert choice.num_tokens == len(CODEC.encode("Hello there")) + 1
    assert choice.finished


def test_a_stop_token_of_the_client_is_named() -> None:
    ids = CODEC.encode("x")
    choice = ChoiceOutput(0, make_job(stop_ids=(EOS, ids[0])), make_rules())
    deltas = push_all(choice, entries("Hello", finish="stop", last=(ids[0],)))
    assert text_of(deltas) == "Hello"
    assert deltas[-1].stop_reason == ids[0]


def test_a_stop_token_is_shown_on_request() -> None:
    ids = CODEC.encode("x")
    choice = ChoiceOutput(0, make_job(stop_ids=(ids[0],)), make_rules(include_stop=True))
    assert text_of(push_all(choice, entries("Hello", finish="stop", last=(ids[0],)))) == "Hellox"


def test_a_stop_string_cuts_the_text_and_says_after_how_many_tokens() -> None:
    choice = ChoiceOutput(0, make_job(), make_rules(("the", "zzz")))
    deltas = push_all(choice, entries("Hello there here where"))
    assert text_of(deltas) == "Hello "
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", "the")
    assert choice.finished
    assert choice.stopped_at == choice.num_tokens
    assert "the" in CODEC.decode(CODEC.encode("Hello there here where")[: choice.num_tokens])


def test_text_held_back_for_a_stop_string_comes_with_the_end() -> None:
    choice = ChoiceOutput(0, make_job(), make_rules(("there!",)))
    deltas = push_all(choice, entries("Hello there", finish="length"))
    assert text_of(deltas) == "Hello there"
    assert deltas[-1].finish_reason == "length"
    assert choice.stopped_at is None


def test_a_stop_string_completed_by_the_last_token_needs_no_cancel() -> None:
    choice = ChoiceOutput(0, make_job(), make_rules(("there",)))
    deltas = push_all(choice, entries("Hello there", finish="length"))
    assert (text_of(deltas), deltas[-1].finish_reason) == ("Hello ", "stop")
    assert choice.stopped_at is None


def test_half_a_character_is_held_back_and_makes_no_delta() -> None:
    choice = ChoiceOutput(0, make_job(), make_rules())
    events = entries("ζ", finish=None)
    assert len(events) == 2, "the tiny tokenizer has no token for this letter"
    assert choice.push(events[0], "1-1") is None
    delta = choice.push(events[1], "1-2")
    assert delta is not None
    assert (delta.text, delta.event_id) == ("ζ", "1-2")


def test_every_token_is_shown_when_its_score_is_wanted() -> None:
    choice = ChoiceOutput(0, make_job(), make_rules(wants_every_token=True))
    deltas = push_all(choice, entries("ζ"))
    assert [delta.text for delta in deltas] == ["", "ζ"]
    assert all(len(delta.token_ids) == 1 for delta in deltas)


def test_what_comes_after_the_end_is_ignored() -> None:
    choice = ChoiceOutput(0, make_job(), make_rules(("the",)))
    events = entries("Hello there")
    push_all(choice, events)
    count = choice.num_tokens
    assert push_all(choice, entries("more and more")) == []
    assert choice.num_tokens == count


def test_scoring_shows_only_the_end() -> None:
    choice = ChoiceOutput(0, make_job(), make_rules(scores_only=True))
    [delta] = push_all(choice, entries("a", finish="stop"))
    assert (delta.text, delta.token_ids, delta.finish_reason) == ("", (), "length")
    assert choice.num_tokens == 0


class FakeHandle:
    """A `StreamReader` that a test feeds."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.position = START
        self.left: list[str] = []
        self.was_abandoned = False
        self.cancels: list[tuple[str, bool, Any]] = []
        self._events: deque[Tokens | End | Exception] = deque()
        self._tell: Callable[[], None] = lambda: None
        self.taken = 0

    def feed(self, *events: Tokens | End | Exception) -> None:
        self._events.extend(events)
        self._tell()

    def on_news(self, tell: Callable[[], None]) -> None:
        self._tell = tell

    def take(self) -> Tokens | End | None:
        if not self._events:
            return None
        event = self._events.popleft()
        if isinstance(event, Exception):
            raise event
        self.taken += 1
        self.position = Position(1, self.taken)
        return event

    async def cancel(self, reason: str, force: bool = False, upto: Any = None) -> None:
        self.cancels.append((reason, force, upto))

    def leave(self, reason: str) -> None:
        self.left.append(reason)


class FakeOpener:
    """Opens `FakeHandle`s; `fail_at` makes the n-th open fail."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.handles: list[FakeHandle] = []
        self._fail_at = fail_at

    async def open(self, job: Job, **_: Any) -> Any:
        if len(self.handles) == self._fail_at:
            raise OSError("no bus")
        self.handles.append(FakeHandle(job))
        return self.handles[-1]

    async def attach(self, request_id: str, **_: Any) -> Any:
        return None

    async def standing(self, request_id: str, num_choices: int, after: Position) -> Standing | None:
        return None

    def let_go(self) -> int:
        return 0


DONE = End("finished", usage=Usage(kv_bytes=10, transport="tcp", prefill_cached_tokens=1))
MakeGeneration = Callable[..., tuple[Generation, FakeOpener, GatewayMetrics]]


def make(
    n: int = 1, jobs: int = 1, opener: FakeOpener | None = None, after: tuple[Position, ...] = (), **rules: Any
) -> Any:
    opener = opener or FakeOpener()
    metrics = GatewayMetrics("m")
    meter = TokenMeter(metrics, time.monotonic())
    readers = submitted([make_job(n, f"r{index}") for index in range(jobs)], opener, meter)
    return Generation(readers, make_rules(**rules), meter, after), opener, metrics


async def drain(generation: Generation) -> list[Delta]:
    deltas: list[Delta] = []
    while (new := await generation.next(5)) is not None:
        assert new, "timed out"
        deltas += new
    return deltas


async def run_through(generation: Generation, opener: FakeOpener, *events: Tokens | End | Exception) -> list[Delta]:
    """Everything a generation gives when its first job gets these events."""
    async with generation:
        opener.handles[0].feed(*events)
        return await drain(generation)


async def test_a_finished_job_is_not_cancelled_and_counts_once() -> None:
    generation, opener, metrics = make()
    async with generation:
        opener.handles[0].feed(*entries("Hello", finish="stop", last=(EOS,)), DONE)
        deltas = await drain(generation)
    assert text_of(deltas) == "Hello"
    assert opener.handles[0].cancels == []
    usage = generation.usage()
    assert (usage.prompt_tokens, usage.completion_tokens) == (3, len(CODEC.encode("Hello")) + 1)
    assert usage.served == (DONE.usage,)
    value = metrics.registry.get_sample_value
    assert value("slipstream_kv_transfer_bytes_total", {"transport": "tcp"}) == 10
    assert value("slipstream_generation_tokens_total") == usage.completion_tokens
    assert value("slipstream_time_to_first_token_seconds_count") == 1
    assert value("slipstream_inter_token_latency_seconds_count") == usage.completion_tokens - 1


async def test_events_that_are_there_come_together() -> None:
    generation, opener, _ = make()
    async with generation:
        events = entries("Hello there")
        opener.handles[0].feed(*events)
        deltas = await generation.next(5)
        assert deltas is not None
        assert len(deltas) == len(events)
        assert [delta.event_id for delta in deltas] == [f"1-{i}" for i in range(1, len(events) + 1)]


async def test_silence_is_an_empty_list() -> None:
    generation, _, _ = make()
    async with generation:
        assert await generation.next(0.01) == []


async def test_leaving_early_cancels() -> None:
    generation, opener, _ = make(jobs=2)

    async def leave_early() -> None:
        async with generation:
            opener.handles[0].feed(*entries("a", finish="stop"), DONE)
            await generation.next(5)
            await generation.next(0.01)
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await leave_early()
    assert [handle.left for handle in opener.handles] == [["client_gone"], ["client_gone"]]
    assert [handle.cancels for handle in opener.handles] == [[], []], "leaving is enough"


async def test_a_failed_submission_cancels_what_was_submitted() -> None:
    generation, opener, _ = make(jobs=3, opener=FakeOpener(fail_at=2))
    with pytest.raises(OSError, match="no bus"):
        async with generation:
            pass
    assert [handle.left for handle in opener.handles] == [["submit_failed"]] * 2


async def test_a_stop_string_ends_its_choice_on_the_bus() -> None:
    generation, opener, _ = make(n=2, stops=("the",))
    async with generation:
        handle = opener.handles[0]
        handle.feed(*entries("Hello there", choice=1))
        deltas = await generation.next(5)
        assert deltas is not None
        [(reason, force, upto)] = handle.cancels
        assert (reason, force) == ("stop_string", False)
        assert upto == {1: generation.usage().completion_tokens}
        handle.feed(*entries("Hello", finish="length"), DONE)
        deltas += await drain(generation)
    texts = {index: text_of([one for one in deltas if one.index == index]) for index in (0, 1)}
    assert texts == {0: "Hello", 1: "Hello "}
    assert len(handle.cancels) == 1


async def test_a_stop_that_the_bus_does_not_take_keeps_no_text_back(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fails(*_: object, **__: object) -> None:
        raise ConnectionError("the bus is gone")

    generation, opener, _ = make(stops=("the",))
    async with generation:
        monkeypatch.setattr(opener.handles[0], "cancel", fails)
        opener.handles[0].feed(*entries("Hello there"))
        deltas = await generation.next(5)
        assert deltas is not None
        assert text_of(deltas) == "Hello "
        with pytest.raises(ConnectionError, match="the bus is gone"):
            await generation.next(5)


async def test_choices_of_several_jobs_are_numbered_through() -> None:
    generation, opener, _ = make(n=2, jobs=2)
    async with generation:
        for handle, word in zip(opener.handles, ("Hello", "there"), strict=True):
            handle.feed(*entries(word, choice=0, finish="stop"), *entries(word, choice=1, finish="stop"), DONE)
        deltas = await drain(generation)
    texts = [text_of([one for one in deltas if one.index == index]) for index in range(4)]
    assert texts == ["Hello", "Hello", "there", "there"]
    assert all(one.event_id.count(",") == 1 for one in deltas), "an id has the position of every job"


@pytest.mark.parametrize("end", [End("error", "engine_error"), End("cancelled", "operator")])
async def test_an_end_without_a_finish_is_a_failure(end: End) -> None:
    generation, opener, _ = make(jobs=2)
    with pytest.raises(GenerationFailed):
        await run_through(generation, opener, *entries("Hel"), end)
    assert [handle.left for handle in opener.handles] == [["client_gone"]] * 2


async def test_an_end_after_all_choices_finished_is_no_failure_whatever_it_says() -> None:
    generation, opener, _ = make()
    async with generation:
        opener.handles[0].feed(*entries("Hello", finish="stop"), End("cancelled", "late"))
        assert text_of(await drain(generation)) == "Hello"


async def test_a_broken_stream_is_raised_and_not_waited_for() -> None:
    generation, opener, _ = make()
    with pytest.raises(RuntimeError, match="broken"):
        await run_through(generation, opener, RuntimeError("broken"))


async def test_prompt_scores_are_kept_for_the_answer() -> None:
    generation, opener, _ = make()
    scored = (None, TokenLogprob(-1.0), TokenLogprob(-2.0))
    async with generation:
        [event] = entries("a", finish="length")
        first = Tokens(0, 0, "", event.h, event.tokens, finish="length", prompt_logprobs=scored)
        opener.handles[0].feed(first, DONE)
        await drain(generation)
        assert generation.prompt_scores(0) == scored


@pytest.mark.parametrize("end", [End("error", "engine_error"), End("error", "draining")])
async def test_what_came_before_a_failure_is_given_out_first(end: End) -> None:
    generation, opener, _ = make()
    async with generation:
        opener.handles[0].feed(*entries("Hello"), end)
        deltas = await generation.next(5)
        assert text_of(deltas) == "Hello"
        assert generation.last_event_id == deltas[-1].event_id, "the failure is no place to go on from"
        with pytest.raises(GenerationFailed):
            await generation.next(5)
        with pytest.raises(GenerationFailed):
            await generation.next(5)


async def test_what_the_client_had_is_marked_and_positions_never_go_back() -> None:
    after = (Position(1, 2), Position(1, 4))
    generation, opener, _ = make(jobs=2, after=after)
    async with generation:
        assert generation.is_resumed
        for handle in opener.handles:
            handle.feed(*entries("Hello there", finish="stop"), DONE)
        deltas = await drain(generation)
    for index, position in enumerate(after):
        own = [delta for delta in deltas if delta.index == index]
        assert [delta.known for delta in own] == [number < position.ev for number in range(len(own))]
    places = [tuple(map(Position.parse, delta.event_id.split(","))) for delta in deltas]
    for earlier, later in itertools.pairwise([after, *places]):
        assert all(a <= b for a, b in zip(earlier, later, strict=True))
    assert not generation.is_all_known


async def test_a_client_that_has_everything_is_told_nothing() -> None:
    events = entries("Hello", finish="stop")
    generation, opener, _ = make(after=(Position(1, len(events) + 1),))
    async with generation:
        opener.handles[0].feed(*events, DONE)
        assert all(delta.known for delta in await drain(generation))
        assert generation.is_all_known


async def test_a_client_that_reads_slowly_does_not_fill_the_memory() -> None:
    generation, opener, _ = make()
    async with generation:
        handle = opener.handles[0]
        events = entries("Hello there " * 200)
        handle.feed(*events)
        await asyncio.sleep(0)
        assert handle.taken == 0, "nothing is taken before it is asked for"
        first = await generation.next(5)
        assert first is not None
        assert len(first) == handle.taken == MAX_AT_ONCE < len(events)
        handle.feed(DONE)
        assert len(await drain(generation)) == len(events) - MAX_AT_ONCE


STOPS = ("the", "re wh", "zzz")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_text_after_a_token_depends_on_the_tokens_up_to_it_only(data: st.DataObject) -> None:
    """However tokens are grouped into entries, by workers or by markers, the text up to each is the same."""
    ids = data.draw(st.lists(st.integers(0, CODEC.vocab_size - 1), min_size=1, max_size=24))
    finish = data.draw(st.sampled_from([None, "stop", "length"]))
    rules: dict[str, Any] = {
        "stops": data.draw(st.sampled_from([(), STOPS])),
        "include_stop": data.draw(st.booleans()),
        "wants_every_token": data.draw(st.booleans()),
    }
    if EOS in ids:
        ids = ids[: ids.index(EOS) + 1]
    cuts = sorted({0, len(ids), *data.draw(st.lists(st.integers(0, len(ids)), max_size=6))})
    ends_apart = finish is not None and data.draw(st.booleans())
    one_by_one, _ = shown_after(ids, list(range(len(ids) + 1)), finish, False, rules)
    grouped, ended = shown_after(ids, cuts, finish, ends_apart, rules)
    for length, text in grouped.items():
        assert text == one_by_one[length], f"after {length} tokens"
    assert ended == shown_after(ids, list(range(len(ids) + 1)), finish, False, rules)[1]


def shown_after(
    ids: list[int], cuts: list[int], finish: str | None, ends_apart: bool, rules: dict[str, Any]
) -> tuple[dict[int, str], tuple[Any, ...]]:
    """({number of tokens: text so far}, how it ended and with how many tokens) for entries cut at `cuts`."""
    choice = ChoiceOutput(0, make_job(), make_rules(**rules))
    text = ""
    shown: dict[int, str] = {}
    ended: tuple[Any, ...] = ()
    spans = list(itertools.pairwise(cuts))
    for start, stop in spans:
        is_last = stop == len(ids)
        h = chain("", ids[:start])
        ends = finish if is_last and not ends_apart else None
        events = [Tokens(0, start, h, chain(h, ids[start:stop]), tuple(ids[start:stop]), finish=ends)]
        if is_last and ends_apart:
            h = chain("", ids)
            events.append(Tokens(0, stop, h, h, (), finish=finish))
        for event in events:
            delta = choice.push(event, "1-1")
            if delta is not None:
                text += delta.text
                if delta.finish_reason is not None:
                    ended = (delta.finish_reason, delta.stop_reason, choice.num_tokens)
        shown[stop] = text
    return shown, ended
