"""Tokenizers of Hugging Face folders, against transformers reading the same folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, processors
from transformers import AutoTokenizer

from shared.errors import ConfigurationError, InvalidRequest, ModelFormatError
from shared.tokenizer.codec import TextCodec
from shared.tokenizer.loader import load_tokenizer
from tests.text_models import (
    CHATML,
    CONTROL,
    PLAIN_ADDED,
    byte_level_tokenizer,
    metaspace_tokenizer,
    model_source,
    sentencepiece_tokenizer,
    token_id,
    write_folder,
)

FAMILIES: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": byte_level_tokenizer,
    "sentencepiece": sentencepiece_tokenizer,
    "metaspace": metaspace_tokenizer,
}
USER = [{"role": "user", "content": "hi"}]


@lru_cache
def loaded(name: str) -> tuple[Any, TextCodec]:
    """transformers' tokenizer and ours, from one folder."""
    ends = {"bos_token": "<s>", "eos_token": "</s>"} if name == "sentencepiece" else {}
    folder = write_folder(Path(mkdtemp()), FAMILIES[name](), {"chat_template": CHATML, **ends})
    return AutoTokenizer.from_pretrained(str(folder)), load_tokenizer(model_source("hf", folder))


def source(folder: Path, *eos_ids: int) -> Any:
    return model_source("hf", folder, eos_ids)


@pytest.mark.parametrize("name", sorted(FAMILIES))
@settings(deadline=None)
@given(text=st.text(max_size=60).filter(lambda text: "<" not in text))
def test_ids_equal_transformers(name: str, text: str) -> None:
    reference, codec = loaded(name)
    assert codec.encode(text) == reference.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("name", sorted(FAMILIES))
@pytest.mark.parametrize("text", ["<|im_end|>", "a<|im_end|> b", "<s></s><unk>", "<think>x</think>"])
def test_control_tokens_in_text_are_parsed_only_when_allowed(name: str, text: str) -> None:
    reference, codec = loaded(name)
    allowed = codec.encode(text, allow_special=True)
    assert allowed == reference.encode(text, add_special_tokens=False)
    spelled = {token for token in codec.encode(text) if codec.is_special(token)}
    assert spelled <= {codec.token_id("<unk>")}


def test_added_tokens_that_are_not_special_are_ordinary_vocabulary() -> None:
    reference, codec = loaded("byte_level")
    text = f"{PLAIN_ADDED[0]}so{PLAIN_ADDED[1]}"
    assert codec.encode(text) == reference.encode(text)
    assert codec.decode(codec.encode(text)) == text


@pytest.mark.parametrize(
    "config",
    [
        {"eos_token": "jump"},
        {"additional_special_tokens": ["jump"]},
        {
            "added_tokens_decoder": {
                "9": {"content": "jump", "special": True},
                "10": {"content": "er", "special": False},
            }
        },
    ],
)
def test_tokens_declared_special_in_the_config_are_control_tokens(tmp_path: Path, config: dict[str, Any]) -> None:
    tokenizer = sentencepiece_tokenizer()
    token = token_id(tokenizer, "jump")
    codec = load_tokenizer(source(write_folder(tmp_path, tokenizer, config)))
    assert codec.is_special(token)
    assert codec.encode("jump", allow_special=True) == [token]
    assert token not in codec.encode("xjump jump jumps")
    assert not codec.is_special(codec.token_id("er") or -1)
    assert codec.token_id("<|im_start|>") is None


def test_the_post_processor_adds_what_the_model_wants(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    bos = tokenizer.token_to_id(CONTROL[0])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{CONTROL[0]} $A", special_tokens=[(CONTROL[0], bos)]
    )
    codec = load_tokenizer(source(write_folder(tmp_path, tokenizer)))
    assert codec.encode("a", add_special_tokens=True) == [bos, *codec.encode("a")]
    assert codec.encode("", add_special_tokens=True) == [bos]


def test_a_special_token_made_by_merges_is_spelled_out(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    state = json.loads(tokenizer.to_str())
    size = len(tokenizer.get_vocab())
    state["model"]["vocab"] |= {"<s": size, "<s>": size + 1}
    state["model"]["merges"] = [["<", "s"], ["<s", ">"], *state["model"]["merges"]]
    forged = Tokenizer.from_str(json.dumps(state))
    forged.add_special_tokens([AddedToken("<s>", special=True, normalized=False)])
    codec = load_tokenizer(source(write_folder(tmp_path, forged)))
    ids = codec.encode("a<s>b")
    assert forged.token_to_id("<s>") not in ids
    assert codec.decode(ids) == "a<s>b"


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    codec = load_tokenizer(source(write_folder(tmp_path, tokenizer)))
    text = "The quick brown fox jumps over it 12345"
    assert codec.decode(codec.encode(text)) == text
    assert 3 < len(codec.encode(text)) < 50


def test_eos_ids_are_the_models_and_the_tokenizers(tmp_path: Path) -> None:
    codec = load_tokenizer(source(write_folder(tmp_path, byte_level_tokenizer()), 9))
    assert codec.eos_ids == (9, codec.token_id("<|im_end|>"))
    assert codec.bos_id == codec.token_id("<|im_start|>")
    assert codec.vocab_size == len(byte_level_tokenizer().get_vocab(with_added_tokens=True))


def test_named_tokens_may_be_objects_and_reach_the_template(tmp_path: Path) -> None:
    config = {"eos_token": {"content": CONTROL[0], "lstrip": False}, "chat_template": "{{ eos_token }}{{ bos_token }}"}
    codec = load_tokenizer(source(write_folder(tmp_path, byte_level_tokenizer(), config)))
    assert codec.template.render(USER).text == CONTROL[0] + "<|im_start|>"
    assert codec.eos_ids == (codec.token_id(CONTROL[0]),)


def test_template_files_win_over_the_config(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, byte_level_tokenizer(), {"chat_template": "config"})
    assert load_tokenizer(source(folder)).template.render(USER).text == "config"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert load_tokenizer(source(folder)).template.render(USER).text == "json"
    (folder / "chat_template.jinja").write_text("jinja")
    assert load_tokenizer(source(folder)).template.render(USER).text == "jinja"
    assert load_tokenizer(source(folder), chat_template="operator").template.render(USER).text == "operator"


def test_the_tool_template_is_used_for_requests_with_tools(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]
    codec = load_tokenizer(source(write_folder(tmp_path, byte_level_tokenizer(), {"chat_template": named})))
    assert codec.template.render(USER).text == "plain"
    assert codec.template.render(USER, tools=[{"type": "function"}]).text == "with tools"


def test_without_a_template_chat_is_refused_with_a_hint(tmp_path: Path) -> None:
    codec = load_tokenizer(source(write_folder(tmp_path, byte_level_tokenizer())))
    assert not codec.has_template
    with pytest.raises(InvalidRequest, match="--chat-template") as caught:
        _ = codec.template
    assert caught.value.param == "messages"


def test_a_broken_template_of_the_model_stops_chat_only(tmp_path: Path) -> None:
    config = {"chat_template": "ok\n{% for %}"}
    codec = load_tokenizer(source(write_folder(tmp_path, byte_level_tokenizer(), config)))
    with pytest.raises(InvalidRequest, match=r"line 2.*--chat-template"):
        _ = codec.template
    assert codec.decode(codec.encode("still works")) == "still works"


@pytest.mark.parametrize("template", ["{{", "{% break %}", "{{ 'a'|no_such_filter }}", "{{ 1 }}" * 200_000])
def test_a_broken_template_of_the_operator_stops_the_start(tmp_path: Path, template: str) -> None:
    folder = write_folder(tmp_path, byte_level_tokenizer())
    with pytest.raises(ConfigurationError, match="chat template"):
        load_tokenizer(source(folder), chat_template=template)


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match=r"no tokenizer\.json.*save_pretrained"):
        load_tokenizer(source(tmp_path))
    folder = write_folder(tmp_path, byte_level_tokenizer())
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelFormatError, match=r"tokenizer_config\.json is not valid JSON"):
        load_tokenizer(source(folder))
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ModelFormatError, match="JSON object"):
        load_tokenizer(source(folder))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ModelFormatError, match=r"tokenizer\.json is not a tokenizer"):
        load_tokenizer(source(folder))
    (folder / "tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ModelFormatError, match="cannot be read"):
        load_tokenizer(source(folder))


def test_half_a_surrogate_pair_is_refused_not_a_crash() -> None:
    _, codec = loaded("byte_level")
    with pytest.raises(InvalidRequest, match="surrogate") as caught:
        codec.encode("a\ud83d")
    assert caught.value.param == "prompt"
