"""Read the tokenizer files of a Hugging Face folder: tokenizer.json, its config, and the chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from shared.errors import ModelFormatError
from shared.tokenizer.template import TemplateSource

MAX_FILE_BYTES = 256 << 20
_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class FolderTokenizer:
    """What a folder holds: the tokenizer, and the chat template with the special tokens by role."""

    tokenizer: Tokenizer
    template: TemplateSource


def read_folder(folder: Path) -> FolderTokenizer:
    """Read a model folder. Raises ModelFormatError naming the file and what to do."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelFormatError(
            f"{folder} has no tokenizer.json; make one with transformers: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
        )
    try:
        tokenizer = Tokenizer.from_str(_read(path))
    except ModelFormatError:
        raise
    except Exception as error:
        # `tokenizers` raises bare Exception for whatever it cannot read.
        raise ModelFormatError(f"{path} is not a tokenizer this version can read: {error}.") from error
    config = _json(folder / "tokenizer_config.json")
    named = _named_tokens(_json(folder / "special_tokens_map.json")) | _named_tokens(config)
    _mark_special(tokenizer, [*named.values(), *_listed_special(config)])
    return FolderTokenizer(tokenizer, _template(folder, config, named))


def _template(folder: Path, config: Mapping[str, object], named: Mapping[str, str]) -> TemplateSource:
    path = folder / "chat_template.jinja"
    if path.is_file():
        tools = folder / "additional_chat_templates" / "tool_use.jinja"
        return TemplateSource(_read(path), _read(tools) if tools.is_file() else None, named)
    value = _json(folder / "chat_template.json").get("chat_template") or config.get("chat_template")
    return TemplateSource(*_texts(value), named)


def _texts(value: object) -> tuple[str | None, str | None]:
    """A chat_template entry: one text, or a list (or object) of named ones, of which default and tool_use count."""
    if isinstance(value, str):
        return value, None
    if isinstance(value, list):
        value = {item.get("name"): item.get("template") for item in value if isinstance(item, Mapping)}
    if not isinstance(value, Mapping):
        return None, None
    default, tools = (text if isinstance(text, str) else None for text in (value.get("default"), value.get("tool_use")))
    return default, tools


def _named_tokens(config: Mapping[str, object]) -> dict[str, str]:
    """The special tokens by role, each given as its text or as an object with `content`."""
    named = {}
    for name in _TOKEN_NAMES:
        value = config.get(name)
        if isinstance(value, Mapping):
            value = value.get("content")
        if isinstance(value, str):
            named[name] = value
    return named


def _listed_special(config: Mapping[str, object]) -> list[str]:
    """The tokens tokenizer_config.json declares special beside the named ones."""
    decoder, extra = config.get("added_tokens_decoder"), config.get("additional_special_tokens")
    entries = [*(decoder.values() if isinstance(decoder, Mapping) else ()), *(extra if isinstance(extra, list) else ())]
    texts = [
        entry.get("content") if isinstance(entry, Mapping) and entry.get("special", True) else entry
        for entry in entries
    ]
    return [text for text in texts if isinstance(text, str)]


def _mark_special(tokenizer: Tokenizer, texts: list[str]) -> None:
    """Make control tokens of declared ones that tokenizer.json holds as plain vocabulary only.

    Declared tokens without an id in tokenizer.json are left out: the model has no embedding for a new id.
    """
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    for text in dict.fromkeys(texts):
        if text not in special and tokenizer.token_to_id(text) is not None:
            tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False)])


def _json(path: Path) -> Mapping[str, object]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise ModelFormatError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ModelFormatError(f"{path} must hold a JSON object.")
    return value


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ModelFormatError(f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB.")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelFormatError(f"{path} cannot be read: {error}.") from error
