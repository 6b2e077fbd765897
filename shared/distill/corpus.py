"""Prompts for the target to write on: the packaged corpus, or a file of the user's own."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from shared.errors import ConfigurationError, RequestError
from shared.tokenizer.codec import TextCodec

_PACKAGED = Path(__file__).parent / "prompts.json"
_HELD_OUT_OF = 16
_MAX_FILE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Prompt:
    """`messages` go through the chat template; a plain `text` is continued as it stands."""

    messages: tuple[tuple[str, str], ...] = ()
    text: str = ""

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(json.dumps([self.messages, self.text]).encode()).digest()

    @property
    def is_held_out(self) -> bool:
        """One prompt in sixteen is never trained on, whatever else is in the file."""
        return self.digest[0] % _HELD_OUT_OF == 0

    def encode(self, codec: TextCodec) -> list[int]:
        """Token ids. A model without a chat template continues what the last message says."""
        if not self.messages or not codec.has_template:
            return codec.encode(self.text or self.messages[-1][1], add_special_tokens=True)
        messages = [{"role": role, "content": content} for role, content in self.messages]
        return codec.encode_chat(codec.template.render(messages))


def asked(content: str) -> Prompt:
    """A conversation of one message."""
    return Prompt(messages=(("user", content),))


def load_prompts(path: Path | None) -> list[Prompt]:
    """The prompts of a file, or the packaged ones, in the order they are used. Raises ConfigurationError."""
    if path is None:
        prompts = list(_expand(json.loads(_PACKAGED.read_text(encoding="utf-8"))))
        return sorted(prompts, key=lambda prompt: prompt.digest)
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise ConfigurationError(f"{path}: is larger than {_MAX_FILE_BYTES} bytes; use a part of it")
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: the prompts cannot be read: {error}") from error
    prompts = [_parse(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if all(prompt.is_held_out for prompt in prompts) or not any(prompt.is_held_out for prompt in prompts):
        raise ConfigurationError(f"{path}: too few prompts to train on some and test on others; give some hundred")
    return prompts


def digest_of(prompts: list[Prompt]) -> str:
    """What tells two lists of prompts apart."""
    return hashlib.sha256(b"".join(prompt.digest for prompt in prompts)).hexdigest()


def encode_all(prompts: list[Prompt], codec: TextCodec, max_tokens: int) -> list[tuple[Prompt, list[int]]]:
    """Prompts with their ids; those that are too long or that the template refuses are left out."""
    encoded = []
    for prompt in prompts:
        try:
            ids = prompt.encode(codec)
        except RequestError:
            continue
        if 0 < len(ids) <= max_tokens:
            encoded.append((prompt, ids))
    if not encoded:
        raise ConfigurationError(f"no prompt is at most {max_tokens} tokens long and fits the chat template")
    return encoded


def _expand(corpus: Mapping[str, object]) -> Iterator[Prompt]:
    """Every template of every kind with every combination of what fills its gaps."""
    kinds = corpus["kinds"]
    assert isinstance(kinds, list)
    for kind in kinds:
        fillers: dict[str, list[str]] = kind.get("fillers") or {"topic": corpus["topics"]}
        for template in kind["templates"]:
            names = [name for name in fillers if f"{{{name}}}" in template]
            for values in itertools.product(*(fillers[name] for name in names)):
                text = template
                for name, value in zip(names, values, strict=True):
                    text = text.replace(f"{{{name}}}", value)
                yield Prompt(text=text) if kind.get("raw") else asked(text)


def _parse(line: str, where: str) -> Prompt:
    if not line.lstrip().startswith("{"):
        return asked(line)
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ConfigurationError(f"{where}: is not valid JSON: {error}") from error
    if isinstance(value.get("prompt"), str):
        return asked(value["prompt"])
    if isinstance(value.get("text"), str) and value["text"]:
        return Prompt(text=value["text"])
    messages = value.get("messages")
    if isinstance(messages, list) and messages and all(_is_message(message) for message in messages):
        return Prompt(messages=tuple((message["role"], message["content"]) for message in messages))
    raise ConfigurationError(f'{where}: give an object with "prompt", "text" or "messages" of roles and contents')


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)
