"""Logs: one JSON line an event, nothing of a prompt or a key in it, tracebacks without locals."""

from __future__ import annotations

import io
import json
import logging

import pytest
import structlog

from shared.observability.logging import FORBIDDEN_FIELDS, configure_logging


@pytest.fixture
def out() -> io.StringIO:
    """A log stream."""
    return io.StringIO()


def lines(out: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_events_are_json_lines_off_a_terminal(out: io.StringIO) -> None:
    configure_logging("info", "auto", out)
    structlog.get_logger().info("worker_ready", role="decode")
    [line] = lines(out)
    assert (line["event"], line["role"], line["level"]) == ("worker_ready", "decode", "info")
    assert str(line["timestamp"]).endswith("Z")


def test_the_level_is_a_floor(out: io.StringIO) -> None:
    configure_logging("warning", "json", out)
    structlog.get_logger().info("quiet")
    structlog.get_logger().warning("loud")
    assert [line["event"] for line in lines(out)] == ["loud"]


def test_fields_that_carry_text_or_secrets_are_withheld(out: io.StringIO) -> None:
    configure_logging("info", "json", out)
    structlog.get_logger().info("oops", **dict.fromkeys(FORBIDDEN_FIELDS, "my secret"))
    assert "my secret" not in out.getvalue()
    assert lines(out)[0]["prompt"] == "[withheld]"


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_tracebacks_show_no_local_variables(out: io.StringIO, log_format: str) -> None:
    configure_logging("info", log_format, out)  # type: ignore[arg-type]

    def fail(prompt: str) -> None:
        raise ValueError("it broke")

    try:
        fail("my " + "secret")
    except ValueError:
        structlog.get_logger().exception("failed")
    assert "it broke" in out.getvalue()
    assert "my secret" not in out.getvalue()


def test_the_standard_librarys_loggers_come_out_the_same_way(out: io.StringIO) -> None:
    configure_logging("info", "json", out)
    logging.getLogger("aiohttp.server").error("bad thing %s", 7)
    logging.getLogger("chatty").info("not shown")
    [line] = lines(out)
    assert (line["event"], line["level"]) == ("bad thing 7", "error")


def test_the_console_format_has_no_colours_off_a_terminal(out: io.StringIO) -> None:
    configure_logging("info", "console", out)
    structlog.get_logger().info("worker_ready", role="decode")
    assert "worker_ready" in out.getvalue()
    assert "\x1b[" not in out.getvalue()
