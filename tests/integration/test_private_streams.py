"""Streams that one worker alone reads go with it, also when somebody writes to one after its death."""

from __future__ import annotations

import pytest
from redis.asyncio import Redis

from shared.bus.requests import PRIVATE_TTL_MS, RequestStore
from shared.bus.results import Begun
from shared.protocol.keys import Keys
from shared.protocol.messages import Job
from shared.protocol.sampling import SamplingParams


@pytest.mark.parametrize("model", ["m", "a@b"])
async def test_an_offer_to_a_dead_worker_makes_no_stream_for_ever(redis_client: Redis, keys: Keys, model: str) -> None:
    store = RequestStore(redis_client, keys)
    private, common = keys.private_work("decode", model, "gone"), keys.work("decode", model)
    assert [keys.is_private(name, model) for name in (private, common)] == [True, False]
    for request_id, stream in (("r1", private), ("r2", common)):
        job = Job(request_id, model, (1, 2), SamplingParams(4, 1), "g", keys.work("prefill", model), stream)
        submitted = await store.submit(job)
        begun = await store.begin(job.prefill_stream, submitted.entry, request_id, "p")  # type: ignore[union-attr]
        assert isinstance(begun, Begun)
        await store.offer(begun.lease, b"address", stream if keys.is_private(stream, model) else "")
    assert 0 < await redis_client.pttl(private) <= PRIVATE_TTL_MS
    assert await redis_client.pttl(common) == -1
