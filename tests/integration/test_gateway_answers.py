"""Answers of the two generation routes, whole and streamed, against a fake worker on a real bus."""

from __future__ import annotations

from typing import Any

import pytest

from shared.protocol.messages import Job
from tests.gateway_rig import CHAT, CODEC, COMPLETIONS, EOS, MESSAGES, MODEL, rig, says


def text_of(events: list[Any], index: int = 0) -> str:
    """The text of one choice from a chat stream's chunks."""
    choices = [choice for event in events[:-1] for choice in event["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content", "") for choice in choices)


async def test_a_whole_chat_answer_has_openai_shape_and_says_which_way_it_went(redis_url: str, deployment: str) -> None:
    async with rig(redis_url, deployment) as it:
        status, body, response = await it.post(CHAT, {"model": MODEL, "messages": MESSAGES})
    assert status == 200
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    choice = body["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "Hello there!", "refusal": None}
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)
    num_prompt, num_output = len(it.worker.jobs[0].prompt_ids), len(CODEC.encode("Hello there!")) + 1
    usage = body["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (num_prompt, num_output)
    assert usage["total_tokens"] == num_prompt + num_output
    assert usage["prompt_tokens_details"] == {"cached_tokens": 2}
    assert usage["slipstream"]["path"] == "remote_prefill"
    assert (usage["slipstream"]["transport"], usage["slipstream"]["kv_bytes"]) == ("shm", 4096)
    assert response.headers["x-request-id"]


async def test_a_chat_stream_has_role_text_finish_usage_done_and_journal_ids(redis_url: str, deployment: str) -> None:
    async with rig(redis_url, deployment) as it:
        ids, events = await it.stream(CHAT, {"messages": MESSAGES, "stream_options": {"include_usage": True}})
    assert events[-1] == "[DONE]"
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert text_of(events) == "Hello there!"
    assert events[-3]["choices"][0] == {
        **{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    }
    assert events[-2]["choices"] == []
    assert events[-2]["usage"]["completion_tokens"] == len(CODEC.encode("Hello there!")) + 1
    assert all(event["usage"] is None for event in events[:-2])
    journal = [tuple(map(int, one.split("-"))) for one in ids if one]
    assert journal == sorted(journal)
    assert len(journal) == len(events) - 2, "all events but the role and [DONE] have a journal id"
    assert len({event["id"] for event in events[:-1]}) == 1
