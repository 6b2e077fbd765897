"""All tables of cases that go over HTTP, for whoever wants every one of them."""

from __future__ import annotations

from tests.badrequests import test_messages as messages
from tests.badrequests import test_other_routes as other_routes
from tests.badrequests import test_sampling as sampling
from tests.badrequests import test_streams as streams
from tests.badrequests import test_structured_output as structured_output
from tests.badrequests import test_transport as transport
from tests.badrequests.cases import Case

KEYS = transport.KEYS
REFUSED: list[Case] = [
    *(*transport.REFUSED, *messages.REFUSED, *sampling.REFUSED, *structured_output.REFUSED),
    *(*other_routes.REFUSED, *streams.REFUSED),
]
ACCEPTED: list[Case] = [*transport.ACCEPTED, *messages.ACCEPTED, *sampling.ACCEPTED, *structured_output.ACCEPTED]
TABLES = [KEYS, REFUSED, ACCEPTED]
