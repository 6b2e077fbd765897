"""What the load asks for, and what an answer is: tokens, text and log-probabilities of each choice."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

CHAT = "/v1/chat/completions"
COMPLETION = "/v1/completions"
FIRST_PLAIN_TOKEN, LAST_PLAIN_TOKEN = 3, 508


@dataclass(frozen=True, slots=True)
class Spec:
    """One kind of request; equal specs have equal answers. `leaves_after`: the client goes after that many events."""

    number: int
    path: str
    body: dict[str, Any]
    stream: bool
    leaves_after: int = 0


@dataclass(slots=True)
class ChoiceAnswer:
    """One choice as it was received; compared whole with the undisturbed one."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    scores: list[Any] = field(default_factory=list)
    finish_reasons: list[str] = field(default_factory=list)


Answer = dict[int, ChoiceAnswer]


def add_part(answer: Answer, choice: dict[str, Any]) -> None:
    """Take one choice of a chunk or of a whole answer, of either route."""
    part = answer.setdefault(choice["index"], ChoiceAnswer())
    part.tokens += choice.get("token_ids") or []
    words = choice.get("delta") or choice.get("message") or {}
    part.text += choice.get("text") or words.get("content") or ""
    part.scores += _scores(choice.get("logprobs"))
    if choice.get("finish_reason"):
        part.finish_reasons.append(f"{choice['finish_reason']}:{choice.get('stop_reason')}")


def _scores(logprobs: dict[str, Any] | None) -> list[Any]:
    """One item for each token: whatever the route says about it."""
    if not logprobs:
        return []
    if "content" in logprobs:
        return list(logprobs["content"])
    columns = (logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], logprobs["text_offset"])
    return [list(row) for row in zip(*columns, strict=True)]


def make_specs(count: int, seed: int, max_tokens: tuple[int, int] = (40, 300)) -> list[Spec]:
    """A mix of everything that has to survive: both routes, choices, sampling, penalties, scores, stop strings."""
    rng = random.Random(seed)
    return [_spec(number, rng, max_tokens) for number in range(count)]


def _spec(number: int, rng: random.Random, max_tokens: tuple[int, int]) -> Spec:
    length = rng.choice([rng.randint(4, 40), rng.randint(100, 400)])
    body: dict[str, Any] = {
        "max_tokens": rng.randint(*max_tokens),
        "seed": rng.randrange(1 << 30),
        "temperature": rng.choice([0.0, 1.0, 1.0]),
        "ignore_eos": rng.random() < 0.8,
        "return_token_ids": True,
    }
    chat = number % 2 == 0
    if chat:
        body["messages"] = [{"role": "user", "content": _words(rng, 1 + length // 8)}]
    else:
        body["prompt"] = [rng.randint(FIRST_PLAIN_TOKEN, LAST_PLAIN_TOKEN) for _ in range(length)]
    for feature in rng.sample(_FEATURES, rng.randint(0, 2)):
        body |= feature(rng, chat)
    return Spec(number, CHAT if chat else COMPLETION, body, stream=number % 4 != 3)


def _words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choice(("river", "stone", "grüße", "42", "lamp", "näher", "🦆", "of")) for _ in range(count))


def _choices(rng: random.Random, chat: bool) -> dict[str, Any]:
    return {"n": rng.randint(2, 3), "temperature": 1.0}


def _penalties(rng: random.Random, chat: bool) -> dict[str, Any]:
    return {"presence_penalty": 0.5, "frequency_penalty": 0.3, "repetition_penalty": 1.1}


def _logprobs(rng: random.Random, chat: bool) -> dict[str, Any]:
    return {"logprobs": True, "top_logprobs": 2} if chat else {"logprobs": 2}


def _stop_strings(rng: random.Random, chat: bool) -> dict[str, Any]:
    """Strings of several tokens that this model says every few hundred tokens, so that some cut a crash in half."""
    return {"stop": [f"w{rng.randint(26, 50)}", f"{rng.randint(1, 9)}w3{rng.randint(1, 9)}"]}


_FEATURES = (_choices, _penalties, _logprobs, _stop_strings)


def differences(found: Answer, expected: Answer) -> list[str]:
    """What is lost, doubled, reordered or different, in words; empty when the answers are equal."""
    problems = []
    if found.keys() != expected.keys():
        problems.append(f"choices {sorted(found)} instead of {sorted(expected)}")
    for index in sorted(found.keys() & expected.keys()):
        problems += [f"choice {index}: {problem}" for problem in _choice_differences(found[index], expected[index])]
    return problems


def _choice_differences(found: ChoiceAnswer, expected: ChoiceAnswer) -> Iterable[str]:
    if found.tokens != expected.tokens:
        yield describe_tokens(found.tokens, expected.tokens)
    if found.text != expected.text:
        yield f"text differs ({len(found.text)} characters instead of {len(expected.text)})"
    if found.scores != expected.scores:
        yield f"log-probabilities differ ({len(found.scores)} instead of {len(expected.scores)})"
    if found.finish_reasons != expected.finish_reasons:
        yield f"finish reasons {found.finish_reasons} instead of {expected.finish_reasons}"


def describe_tokens(found: list[int], expected: list[int]) -> str:
    """Name the first difference between two lists of tokens."""
    at = next(
        (i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), min(len(found), len(expected))
    )
    rest, wanted = found[at:], expected[at:]
    if (wanted[1:] and rest[: len(wanted) - 1] == wanted[1 : len(rest) + 1]) or not rest:
        kind = "lost"
    elif rest[1:] and rest[1 : len(wanted) + 1] == wanted[: len(rest) - 1]:
        kind = "doubled"
    elif sorted(found) == sorted(expected):
        kind = "reordered"
    else:
        kind = "different"
    return f"token {kind} at position {at} ({len(found)} tokens instead of {len(expected)})"
