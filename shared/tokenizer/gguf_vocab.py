"""Build a tokenizer from a GGUF file's metadata.

A GGUF names its pre-tokenizer by a word (`tokenizer.ggml.pre`). A word this table does not know is
refused, because a wrong split gives different tokens without any sign of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from shared.errors import ModelFormatError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_SPACE = "▁"
_LARGEST = 2.0**63
"""No type or score of a token is larger; infinities and NaN fail the comparison."""

_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
_GPT2 = rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)"
_TIKTOKEN = (
    rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}DIGITS| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(*patterns: str) -> pre_tokenizers.PreTokenizer:
    """Cut by each pattern in turn, matches and gaps alike staying pieces, then bytes to characters."""
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _single_digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _llama3() -> pre_tokenizers.PreTokenizer:
    return _split(_TIKTOKEN.replace("DIGITS", "{1,3}"))


def _qwen2() -> pre_tokenizers.PreTokenizer:
    return _split(_TIKTOKEN.replace("DIGITS", ""))


def _default() -> pre_tokenizers.PreTokenizer:
    return _split(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")


@dataclass(frozen=True, slots=True)
class PreTokenization:
    """What a `pre` word stands for. `whole_words`: a word that is itself a token is taken without merging."""

    split: Callable[[], pre_tokenizers.PreTokenizer]
    adds_bos: bool = False
    whole_words: bool = False
    composes: bool = False


PRE_TOKENIZATIONS: dict[str, PreTokenization] = {
    "default": PreTokenization(_default),
    "gpt-2": PreTokenization(_gpt2),
    "llama-bpe": PreTokenization(_llama3, adds_bos=True, whole_words=True),
    "qwen2": PreTokenization(_qwen2, composes=True),
    "refact": PreTokenization(_single_digits),
    "smollm": PreTokenization(_single_digits),
    "starcoder": PreTokenization(_single_digits),
}


@dataclass(frozen=True, slots=True)
class GgufVocab:
    """The tokenizer.ggml.* entries, checked. `types[i]` and `scores[i]` belong to `tokens[i]`."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    bos_id: int | None
    eos_id: int | None
    unknown_id: int | None
    add_bos: bool | None
    add_eos: bool
    add_space_prefix: bool


def read_vocab(metadata: Mapping[str, object]) -> GgufVocab:
    """Read and check the vocabulary. Raises ModelFormatError naming the entry at fault."""
    tokens = _strings(metadata, "tokens")
    if not tokens or len(set(tokens)) != len(tokens):
        raise ModelFormatError("tokenizer.ggml.tokens is empty or holds the same token twice.")
    return GgufVocab(
        model=_word(metadata, "model", ""),
        pre=_word(metadata, "pre", "default"),
        tokens=tokens,
        types=[int(kind) for kind in _numbers(metadata, "token_type", len(tokens), float(_NORMAL))],
        scores=_numbers(metadata, "scores", len(tokens), 0.0),
        merges=_strings(metadata, "merges"),
        bos_id=token_id(metadata, "bos_token_id", len(tokens)),
        eos_id=token_id(metadata, "eos_token_id", len(tokens)),
        unknown_id=token_id(metadata, "unknown_token_id", len(tokens)),
        add_bos=_flag(metadata, "add_bos_token"),
        add_eos=bool(_flag(metadata, "add_eos_token")),
        add_space_prefix=_flag(metadata, "add_space_prefix") is not False,
    )


def build_tokenizer(vocab: GgufVocab) -> Tokenizer:
    """The tokenizer of a GGUF. Raises ModelFormatError for a model or pre-tokenizer outside the tables."""
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if vocab.model not in builders:
        raise ModelFormatError(
            f"tokenizer.ggml.model {vocab.model!r} is not supported; supported are {', '.join(sorted(builders))}."
        )
    try:
        tokenizer, adds_bos = builders[vocab.model](vocab)
    except ModelFormatError:
        raise
    except Exception as error:
        # `tokenizers` raises bare Exception, for example for a merge of unknown parts.
        raise ModelFormatError(f"The GGUF's vocabulary does not make a tokenizer: {error}.") from error
    _add_control_tokens(tokenizer, vocab)
    _wrap(tokenizer, vocab, adds_bos if vocab.add_bos is None else vocab.add_bos)
    return tokenizer


def _byte_level(vocab: GgufVocab) -> tuple[Tokenizer, bool]:
    pre = PRE_TOKENIZATIONS.get(vocab.pre)
    if pre is None:
        known = ", ".join(sorted(PRE_TOKENIZATIONS))
        raise ModelFormatError(f"tokenizer.ggml.pre {vocab.pre!r} is not supported; supported are {known}.")
    merges = [_pair(merge) for merge in vocab.merges]
    tokenizer = Tokenizer(models.BPE(vocab=_ids(vocab), merges=merges, ignore_merges=pre.whole_words))
    if pre.composes:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre.split()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, pre.adds_bos


def _sentencepiece(vocab: GgufVocab) -> tuple[Tokenizer, bool]:
    """SentencePiece-BPE: merges are implied by the scores; characters without a token fall back to bytes."""
    unknown = vocab.tokens[vocab.unknown_id] if vocab.unknown_id is not None else None
    model = models.BPE(
        vocab=_ids(vocab), merges=_implied_merges(vocab), unk_token=unknown, fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    to_mark = [normalizers.Replace(" ", _SPACE)]
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(_SPACE), *to_mark] if vocab.add_space_prefix else to_mark
    )
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if vocab.add_space_prefix else steps)
    return tokenizer, True


def _implied_merges(vocab: GgufVocab) -> list[tuple[str, str]]:
    """Every way to make a text token of two others, best score first; ties keep vocabulary order."""
    ids = _ids(vocab)
    mergeable = (_NORMAL, _USER_DEFINED, _UNUSED)
    found: list[tuple[float, int, int, int, tuple[str, str]]] = []
    for index, token in enumerate(vocab.tokens):
        if vocab.types[index] not in mergeable:
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                found.append((-vocab.scores[index], index, ids[left], ids[right], (left, right)))
    return [merge[-1] for merge in sorted(found)]


def _add_control_tokens(tokenizer: Tokenizer, vocab: GgufVocab) -> None:
    for token, kind in zip(vocab.tokens, vocab.types, strict=True):
        if kind in (_CONTROL, _UNKNOWN):
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)])


def _wrap(tokenizer: Tokenizer, vocab: GgufVocab, add_bos: bool) -> None:
    bos = vocab.bos_id if add_bos else None
    eos = vocab.eos_id if vocab.add_eos else None
    used = [token for token in (bos, eos) if token is not None]
    if used:
        before = "" if bos is None else f"{vocab.tokens[bos]} "
        after = "" if eos is None else f" {vocab.tokens[eos]}"
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{before}$A{after}", special_tokens=[(vocab.tokens[token], token) for token in set(used)]
        )


def _ids(vocab: GgufVocab) -> dict[str, int]:
    return {token: index for index, token in enumerate(vocab.tokens)}


def _pair(merge: str) -> tuple[str, str]:
    left, blank, right = merge.partition(" ")
    if not blank or not left or not right:
        raise ModelFormatError(f"tokenizer.ggml.merges holds {merge!r}, which is not two tokens with a blank between.")
    return left, right


def _strings(metadata: Mapping[str, object], key: str) -> list[str]:
    values = metadata.get(f"tokenizer.ggml.{key}", [])
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ModelFormatError(f"tokenizer.ggml.{key} must be an array of strings.")
    return values


def _numbers(metadata: Mapping[str, object], key: str, count: int, default: float) -> list[float]:
    values = metadata.get(f"tokenizer.ggml.{key}")
    if values is None:
        return [default] * count
    if (
        not isinstance(values, Sequence)
        or len(values) != count
        or not all(type(value) in (int, float) and abs(value) <= _LARGEST for value in values)
    ):
        raise ModelFormatError(f"tokenizer.ggml.{key} must be an array of {count} numbers, one a token.")
    return list(values)


def _word(metadata: Mapping[str, object], key: str, default: str) -> str:
    return str(metadata.get(f"tokenizer.ggml.{key}", default))


def _flag(metadata: Mapping[str, object], key: str) -> bool | None:
    value = metadata.get(f"tokenizer.ggml.{key}")
    return None if value is None else bool(value)


def token_id(metadata: Mapping[str, object], key: str, num_tokens: int) -> int | None:
    """An id entry of the vocabulary. Raises ModelFormatError when it is outside."""
    value = metadata.get(f"tokenizer.ggml.{key}")
    if value is None:
        return None
    if not isinstance(value, int) or not 0 <= value < num_tokens:
        raise ModelFormatError(f"tokenizer.ggml.{key} is {value!r}; it must be an id below {num_tokens}.")
    return value
