"""Records of answers when what lies in Redis is not ours."""

from __future__ import annotations

from redis.asyncio import Redis
from structlog.testing import capture_logs

from services.gateway.idempotency import Record, Ticket
from shared.bus.stored import Claim, ResponseStore
from shared.protocol.keys import Keys
from tests.unit.test_stored import STORED


async def test_an_unreadable_claim_hides_no_failed_submission(redis_client: Redis, keys: Keys) -> None:
    """Taking the records back may fail; it says so in the log and leaves the first error to be told."""
    store, claim = ResponseStore(redis_client, keys), Claim(STORED.response_id, "body", 60_000)
    record = Record(store, STORED, 60_000, Ticket("digest", "body"), claim)
    await record.write(None)
    await redis_client.set(keys.idempotency("digest"), b"no claim")
    with capture_logs() as logs:
        await record.forget()
    assert [log["event"] for log in logs] == ["records_left"]
    assert await redis_client.get(keys.idempotency("digest")) == b"no claim"
