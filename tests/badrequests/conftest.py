"""One gateway for a whole module of bad requests: none of them may spoil it for the next."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator

import pytest_asyncio

from tests.badrequests.cases import MAX_MESSAGES, MAX_PROMPTS
from tests.gateway_rig import Rig, rig

MAX_BODY_BYTES = 1 << 20


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def it(redis_url: str) -> AsyncIterator[Rig]:
    limits = {"max_body_bytes": MAX_BODY_BYTES, "max_prompts": MAX_PROMPTS, "max_messages": MAX_MESSAGES}
    async with rig(redis_url, f"bad-{secrets.token_hex(6)}", gateway=limits) as one:
        yield one
        assert one.metric("requests_in_flight") == 0
