"""Bad requests, rows 36 and 37: templates of the operator that refuse, fail, or would run for ever."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from shared.tokenizer.codec import TextCodec
from shared.tokenizer.sandbox import RenderLimits
from shared.tokenizer.template import ChatTemplate, TemplateSource
from tests.badrequests.cases import CANARY, Case, chat, check_error
from tests.gateway_rig import COMPLETIONS, EOS, Rig, make_model, rig
from tests.text_models import byte_level_tokenizer

REFUSES = "{{ raise_exception('Roles must alternate.') }}"
RUNS_FOR_EVER = "{% for a in range(99999) %}{% for b in range(99999) %}{{ '' }}{% endfor %}{% endfor %}"
WRITES_TOO_MUCH = "{% set ns = namespace(x='zebra') %}{% for a in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}"


@asynccontextmanager
async def rig_with(redis_url: str, template: str) -> AsyncIterator[Rig]:
    codec = TextCodec(byte_level_tokenizer(), eos_ids=[EOS])
    limits = RenderLimits(max_chars=1 << 16, max_seconds=0.3)
    codec.set_template(ChatTemplate(TemplateSource(template), codec.control_tokens, limits))
    async with rig(redis_url, f"bad-{secrets.token_hex(6)}", model=make_model(codec=codec)) as one:
        yield one


async def test_a_template_that_refuses(redis_url: str) -> None:
    async with rig_with(redis_url, REFUSES) as it:
        status, body, response = await it.post("/v1/chat/completions", chat())
        check_error(status, response.headers, body, Case(36, "refuses", param="messages"))
        assert "Roles must alternate." in body["error"]["message"]
        assert it.worker.jobs == []


@pytest.mark.parametrize("template", [RUNS_FOR_EVER, WRITES_TOO_MUCH, "{{ messages.nothing.here }}", "{{ 1 // 0 }}"])
async def test_a_template_over_its_bounds(redis_url: str, template: str) -> None:
    async with rig_with(redis_url, template) as it:
        bad = asyncio.create_task(it.post("/v1/chat/completions", chat()))
        served = await it.post(COMPLETIONS, CANARY)
        status, body, response = await bad
        assert served[0] == 200, "a template does not stop others"
        check_error(status, response.headers, body, Case(37, "too costly", param="messages"))
