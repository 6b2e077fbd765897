"""Load the tokenizer and chat template that belong to a model, from a Hugging Face folder or a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping

import structlog
from tokenizers import Tokenizer

from shared.errors import ConfigurationError
from shared.model.gguf import read_metadata
from shared.model.source import ModelSource
from shared.tokenizer.codec import TextCodec
from shared.tokenizer.gguf_vocab import build_tokenizer, read_vocab
from shared.tokenizer.hf_folder import read_folder
from shared.tokenizer.sandbox import RenderLimits
from shared.tokenizer.template import ChatTemplate, TemplateSource

log = structlog.get_logger()


def load_tokenizer(
    source: ModelSource, *, chat_template: str | None = None, limits: RenderLimits | None = None
) -> TextCodec:
    """Load a model's text side. `chat_template` (the operator's own) replaces the model's.

    Raises ModelFormatError when the tokenizer cannot be read, ConfigurationError when the operator's
    template does not compile. A template of the model that does not compile is logged, and chat
    requests are refused with the reason; completions are served all the same.
    """
    codec, template = _from_gguf(source) if source.kind == "gguf" else _from_folder(source)
    if chat_template is not None:
        template = TemplateSource(chat_template, None, template.variables)
        codec.set_template(ChatTemplate(template, codec.control_tokens, limits))
    elif template.text is not None:
        _set_model_template(codec, template, limits)
    return codec


def _set_model_template(codec: TextCodec, template: TemplateSource, limits: RenderLimits | None) -> None:
    try:
        codec.set_template(ChatTemplate(template, codec.control_tokens, limits))
    except ConfigurationError as error:
        log.warning("chat_template_unusable", reason=str(error))
        codec.set_template(None, str(error))


def _from_gguf(source: ModelSource) -> tuple[TextCodec, TemplateSource]:
    metadata = read_metadata(source.path)
    vocab = read_vocab(metadata)
    ids = {"bos_token": vocab.bos_id, "eos_token": vocab.eos_id, "unk_token": vocab.unknown_id}
    named = {name: vocab.tokens[token] for name, token in ids.items() if token is not None}
    codec = _codec(source, build_tokenizer(vocab), named)
    texts = (metadata.get(key) for key in ("tokenizer.chat_template", "tokenizer.chat_template.tool_use"))
    plain, with_tools = (text if isinstance(text, str) else None for text in texts)
    return codec, TemplateSource(plain, with_tools, named)


def _from_folder(source: ModelSource) -> tuple[TextCodec, TemplateSource]:
    found = read_folder(source.path)
    return _codec(source, found.tokenizer, found.template.variables), found.template


def _codec(source: ModelSource, tokenizer: Tokenizer, named: Mapping[str, str]) -> TextCodec:
    bos, eos = (tokenizer.token_to_id(named[name]) if name in named else None for name in ("bos_token", "eos_token"))
    eos_ids = source.generation.eos_ids if eos is None else (*source.generation.eos_ids, eos)
    return TextCodec(tokenizer, eos_ids=eos_ids, bos_id=bos)
