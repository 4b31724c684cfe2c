"""The two log formats, and how foreign loggers come out."""

import io
import json
import logging
import threading

import pytest
import structlog

from shared.log import configure_logging


@pytest.fixture(autouse=True)
def restored_logging():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def lines(stream):
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_json_lines_carry_event_fields_service_and_worker_from_every_thread():
    out = io.StringIO()
    configure_logging("decode", "info", "json", stream=out, worker_id="decode-0")
    log = structlog.get_logger("shared.sample")
    thread = threading.Thread(target=lambda: log.info("fetched", num_blocks=3, key=b"\x01"))
    thread.start()
    thread.join()
    [line] = lines(out)
    assert line.pop("timestamp").endswith("Z")
    expected = {"event": "fetched", "level": "info", "service": "decode", "worker_id": "decode-0", "num_blocks": 3}
    assert line == {**expected, "key": "AQ=="}


def test_lines_below_the_level_are_dropped_also_of_libraries():
    out = io.StringIO()
    configure_logging("decode", "warning", "json", stream=out)
    structlog.get_logger().info("quiet")
    logging.getLogger("somebody").info("quiet")
    logging.getLogger("somebody").warning("loud %d", 7)
    assert [(line["event"], line["service"]) for line in lines(out)] == [("loud 7", "decode")]


def test_a_logger_made_before_the_configuration_follows_it_and_later_changes():
    log = structlog.get_logger()
    first, second = io.StringIO(), io.StringIO()
    configure_logging("a", fmt="json", stream=first)
    log.info("one")
    configure_logging("b", fmt="json", stream=second)
    log.info("two")
    assert [line["event"] for line in lines(first)] == ["one"]
    assert [line["service"] for line in lines(second)] == ["b"]


def test_an_exception_is_one_json_line_with_its_traceback():
    out = io.StringIO()
    configure_logging("a", fmt="json", stream=out)
    try:
        raise KeyError("gone")
    except KeyError:
        structlog.get_logger().exception("failed")
    [line] = lines(out)
    assert "KeyError: 'gone'" in line["exception"]


def test_console_lines_have_no_colour_codes_where_nobody_sees_them():
    out = io.StringIO()
    configure_logging("prefill", stream=out)
    structlog.get_logger().warning("slow", seconds=2)
    assert "slow" in out.getvalue()
    assert "service=prefill" in out.getvalue()
    assert "\x1b" not in out.getvalue()
