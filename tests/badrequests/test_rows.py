"""Every kind of bad request has a case in one of the tables, or a test of its own."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.badrequests.cases import Case
from tests.badrequests.rows import NOT_HERE, ROWS
from tests.badrequests.tables import TABLES

ROOT = Path(__file__).resolve().parents[2]
REFUSALS = "tests/integration/test_gateway_refusals.py"
OWN_TESTS = {
    13: ("tests/badrequests/test_transport.py", "test_heads_that_are_no_http"),
    16: ("tests/badrequests/test_transport.py", "test_a_request_id_that_is_not_harmless_is_replaced"),
    17: (REFUSALS, "test_full_means_503_and_a_keys_share_429"),
    18: (REFUSALS, "test_full_means_503_and_a_keys_share_429"),
    19: (REFUSALS, "test_without_workers_nothing_is_taken"),
    32: ("tests/badrequests/test_messages.py", "test_text_that_looks_like_control_tokens_is_only_text"),
    36: ("tests/badrequests/test_templates.py", "test_a_template_that_refuses"),
    37: ("tests/badrequests/test_templates.py", "test_a_template_over_its_bounds"),
    73: ("tests/badrequests/test_websocket.py", "test_a_bad_frame_is_an_error_and_the_socket_stays_open"),
    74: ("tests/badrequests/test_websocket.py", "test_without_a_key_there_is_no_handshake"),
    75: ("tests/badrequests/test_streams.py", "test_refused"),
    77: ("tests/badrequests/test_other_routes.py", "test_paths_that_climb_lead_nowhere"),
}


def test_every_row_is_tested() -> None:
    tested = {case.row for table in TABLES for case in table}
    assert sorted(tested | OWN_TESTS.keys() | NOT_HERE.keys()) == sorted(ROWS)
    assert not tested & NOT_HERE.keys()


@pytest.mark.parametrize("row", OWN_TESTS)
def test_the_tests_named_are_there(row: int) -> None:
    path, name = OWN_TESTS[row]
    assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8")


@pytest.mark.parametrize("table", TABLES)
def test_no_case_stands_twice(table: list[Case]) -> None:
    names = Counter((case.row, case.name) for case in table)
    assert [name for name, count in names.items() if count > 1] == []
