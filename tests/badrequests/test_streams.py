"""Bad requests, row 75: resuming streams at positions that are none, and streams that are not there."""

from __future__ import annotations

import pytest

from tests.badrequests.cases import Case, check_refused, parametrize
from tests.gateway_rig import Rig

pytestmark = pytest.mark.asyncio(loop_scope="module")

STREAM = "/v1/streams/chatcmpl-" + "0" * 32
NOT_FOUND = "stream_not_found"


def missing(name: str, path: str, method: str = "GET") -> Case:
    return Case(75, name, None, 404, NOT_FOUND, None, path, method)


def at_position(position: str) -> Case:
    path = f"{STREAM}?starting_after={position}"
    return Case(75, f"position {position!r}", None, 400, "invalid_value", "starting_after", path, "GET")


REFUSED = [
    missing("an id nobody has", STREAM),
    missing("to cancel an id nobody has", STREAM, "DELETE"),
    missing("no id of ours", "/v1/streams/zebra"),
    missing("a path that climbs", "/v1/streams/..%2f..%2fetc"),
    missing("an id of 4 KiB", "/v1/streams/" + "a" * 4096),
    *[at_position(text) for text in ("-1", "1", "zebra", "1-", "-1-1", "1-1-1", "%00", "9" * 400, "1-1,", "1-1.x")],
    Case(
        *(75, "a bad Last-Event-ID", None, 400, "invalid_value", "Last-Event-ID", STREAM, "GET"),
        {"Last-Event-ID": "zebra"},
    ),
]


@parametrize(REFUSED)
async def test_refused(it: Rig, case: Case) -> None:
    await check_refused(it, case)
