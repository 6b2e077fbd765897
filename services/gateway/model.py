"""What the gateway needs of a model: its text side and its limits; no weights, no torch."""

from __future__ import annotations

from dataclasses import dataclass

from services.gateway.params import SamplingDefaults
from shared.config import Settings
from shared.errors import ConfigurationError
from shared.model.source import ModelSource, resolve
from shared.tokenizer.codec import TextCodec
from shared.tokenizer.loader import load_tokenizer

_MAX_TEMPLATE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model as the gateway serves it: name, text, and how long a request may be."""

    name: str
    codec: TextCodec
    vocab_size: int
    max_model_len: int
    defaults: SamplingDefaults


def load_model(settings: Settings) -> LoadedModel:
    """Read tokenizer, template and defaults; no weights. Raises ConfigurationError."""
    source = resolve(settings.model)
    codec = load_tokenizer(source, chat_template=_read_template(settings.chat_template))
    longest = source.config.max_position
    return LoadedModel(
        name=settings.served_model_name or source.name,
        codec=codec,
        vocab_size=source.config.vocab_size,
        max_model_len=min(settings.engine.max_model_len or longest, longest),
        defaults=_defaults(source) if settings.gateway.generation_defaults else SamplingDefaults(),
    )


def _read_template(setting: str) -> str | None:
    """The operator's template: a file's content, or the setting itself when it is a template's text."""
    if not setting or "{%" in setting or "{{" in setting:
        return setting or None
    try:
        with open(setting, encoding="utf-8") as file:
            return file.read(_MAX_TEMPLATE_BYTES)
    except (OSError, UnicodeError) as exc:
        raise ConfigurationError(f"SLIPSTREAM_CHAT_TEMPLATE {setting!r} cannot be read: {exc}") from None


def _defaults(source: ModelSource) -> SamplingDefaults:
    given = source.generation
    return SamplingDefaults(given.temperature, given.top_p, given.top_k, given.min_p, given.repetition_penalty)
