"""Text to token ids and back, for one model. Imports neither torch nor transformers."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence

from tokenizers import AddedToken, Encoding, Tokenizer

from shared.errors import InvalidRequest, ModelFormatError
from shared.tokenizer.detokenizer import Detokenizer
from shared.tokenizer.pieces import Pieces, read_rules
from shared.tokenizer.shadow import check_text
from shared.tokenizer.template import ChatTemplate, Rendered, Segment

NO_TEMPLATE = (
    "This model has no chat template, so it cannot hold a chat. Use /v1/completions, "
    "or start the server with --chat-template FILE."
)


class TextCodec:
    """Encodes prompts and decodes tokens. Immutable after construction; methods may run in any thread.

    Control tokens ("special" in tokenizer.json, type control in GGUF) come out of text only where the
    caller allows it: `encode(allow_special=True)` or a template's own writing in `encode_chat`.
    """

    def __init__(self, tokenizer: Tokenizer, *, eos_ids: Iterable[int] = (), bos_id: int | None = None) -> None:
        """Takes the tokenizer over. Raises ModelFormatError when its decoder is of no supported family."""
        tokenizer.no_truncation()
        tokenizer.no_padding()
        added = tokenizer.get_added_tokens_decoder()
        self._tokenizer = tokenizer
        self._plain = _twin(tokenizer, added)
        self._inner = _without_first_prefix(self._plain, added)
        self._special = {token_id: token for token_id, token in added.items() if token.special}
        self._special_ids = frozenset(self._special)
        self._id_of = {token.content: token_id for token_id, token in self._special.items()}
        unknown = getattr(tokenizer.model, "unk_token", None)
        self._forgeable = self._special_ids - {self._id_of.get(unknown or "", -1)}
        self._template: ChatTemplate | None = None
        self._template_problem = NO_TEMPLATE
        decoder = tokenizer.decoder
        self.pieces = Pieces(tokenizer, read_rules(json.loads(decoder.__getstate__()) if decoder else None))
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.eos_ids = tuple(dict.fromkeys(eos_ids))
        self.bos_id = bos_id

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """The text of every control token."""
        return tuple(self._id_of)

    @property
    def has_template(self) -> bool:
        return self._template is not None

    @property
    def template(self) -> ChatTemplate:
        """The chat template. Raises InvalidRequest (param "messages") when the model has none that works."""
        if self._template is None:
            raise InvalidRequest(self._template_problem, param="messages")
        return self._template

    def set_template(self, template: ChatTemplate | None, problem: str = NO_TEMPLATE) -> None:
        """Called once while loading: the template, or why chat requests are refused."""
        self._template, self._template_problem = template, problem

    def encode(self, text: str, *, add_special_tokens: bool = False, allow_special: bool = False) -> list[int]:
        """Ids of a text. `add_special_tokens` adds what the model wants around one (a BOS).

        Without `allow_special`, text that spells a control token is ordinary text.
        Raises InvalidRequest (param "prompt") for text that is not valid Unicode.
        """
        check_text(text, "prompt")
        if allow_special:
            return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)
        return self._disarm(self._plain.encode(text, add_special_tokens=add_special_tokens))

    def encode_chat(self, rendered: Rendered) -> list[int]:
        """Ids of a rendered conversation: its special segments as control tokens, all else as plain text."""
        ids: list[int] = []
        at_start = True
        segments = rendered.segments
        for index, segment in enumerate(segments):
            if segment.is_special:
                ids.append(self._id_of[segment.text])
            else:
                text = self._trimmed(segments, index)
                check_text(text, "messages")
                encoder = self._plain if at_start else self._inner
                ids += self._disarm(encoder.encode(text, add_special_tokens=False))
            at_start = False
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The whole text of some ids; ids the tokenizer does not know are no text."""
        stream = Detokenizer(self, skip_special=skip_special)
        return stream.push(ids) + stream.flush()

    def is_special(self, token: int) -> bool:
        return token in self._special_ids

    def token_bytes(self, token: int) -> bytes:
        """The exact bytes of one token, which may be part of a character."""
        return self.pieces.of(token)

    def token_text(self, token: int) -> str:
        """One token as text; bytes that are no whole character become U+FFFD."""
        return self.pieces.of(token).decode(errors="replace")

    def token_id(self, text: str) -> int | None:
        """The id of a token given by its exact text, None when there is none."""
        token: int | None = self._tokenizer.token_to_id(text)
        return token

    def _trimmed(self, segments: Sequence[Segment], index: int) -> str:
        """The text of a segment without the blanks that neighbouring control tokens swallow (lstrip, rstrip)."""
        text = segments[index].text
        if index and (before := self._token_of(segments[index - 1])) and before.rstrip:
            text = text.lstrip()
        if index + 1 < len(segments) and (after := self._token_of(segments[index + 1])) and after.lstrip:
            text = text.rstrip()
        return text

    def _token_of(self, segment: Segment) -> AddedToken | None:
        return self._special[self._id_of[segment.text]] if segment.is_special else None

    def _disarm(self, encoding: Encoding) -> list[int]:
        """Spell out control tokens that the model's merges made of plain text; BOS and the like stay."""
        ids: list[int] = encoding.ids
        if self._forgeable.isdisjoint(ids):
            return ids
        disarmed: list[int] = []
        for token, is_wrapping in zip(ids, encoding.special_tokens_mask, strict=True):
            disarmed += [token] if is_wrapping or token not in self._forgeable else self._spelled(token)
        return disarmed

    def _spelled(self, token: int) -> list[int]:
        """A control token's text character by character."""
        model, text = self._tokenizer.model, self.pieces.in_alphabet(self._special[token].content)
        ids = (piece.id for char in text for piece in model.tokenize(char))
        return [token_id for token_id in ids if token_id not in self._forgeable]


def _twin(tokenizer: Tokenizer, added: Mapping[int, AddedToken]) -> Tokenizer:
    """A second tokenizer over the same vocabulary that reads control tokens in a text as plain text.

    The choice is a flag on the tokenizer, so one object serving both ways could not be shared by threads.
    """
    twin = Tokenizer(tokenizer.model)
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if (value := getattr(tokenizer, part)) is not None:
            setattr(twin, part, value)
    twin.add_tokens([added[token_id] for token_id in sorted(added)])
    if any(twin.token_to_id(token.content) != token_id for token_id, token in added.items()):
        raise ModelFormatError("The tokenizer's added tokens have gaps in their ids; save it again with transformers.")
    twin.encode_special_tokens = True
    return twin


def _without_first_prefix(tokenizer: Tokenizer, added: Mapping[int, AddedToken]) -> Tokenizer:
    """The tokenizer for text that does not open the prompt: a Metaspace that marks only the first word marks none."""
    if tokenizer.pre_tokenizer is None:
        return tokenizer
    state = tokenizer.pre_tokenizer.__getstate__()
    if b'"prepend_scheme":"first"' not in state:
        return tokenizer
    inner = _twin(tokenizer, added)
    pre_tokenizer = copy.deepcopy(tokenizer.pre_tokenizer)
    pre_tokenizer.__setstate__(state.replace(b'"prepend_scheme":"first"', b'"prepend_scheme":"never"'))
    inner.pre_tokenizer = pre_tokenizer
    return inner
