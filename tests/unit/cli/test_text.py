"""Text from a service never controls the terminal."""

import json

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.text import UNSAFE, clean_strings, clean_text
from tests.unit.cli.fake_service import JOB_ID, FakeService
from tests.unit.cli.test_commands import run_command

TITLE = "\x1b]0;owned\x07"
CLIPBOARD = "\x1b]52;c;cm0gLXJm\x1b\\"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text\n\tindented", "plain text\n\tindented"),
        ("naïve – 模型 🙂", "naïve – 模型 🙂"),
        (TITLE, "␛]0;owned␇"),
        ("\x1b[2J\x1b[1;1H", "␛[2J␛[1;1H"),
        ("\x9b2J", "\ufffd2J"),
        ("10%\r20%\r\ndone", "10%\n20%\ndone"),
        ("a\x7fb\x00", "a␡b␀"),
        ("abc\u202edef", "abc\ufffddef"),
    ],
)
def test_control_characters_become_visible(text: str, shown: str) -> None:
    assert clean_text(text) == shown


@given(st.text())
def test_no_control_character_is_left(text: str) -> None:
    cleaned = clean_text(text)
    assert not UNSAFE.search(cleaned)
    assert clean_text(cleaned) == cleaned


@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))
)
def test_every_string_of_an_answer_is_cleaned(value: object) -> None:
    assert not UNSAFE.search(json.dumps(clean_strings(value), ensure_ascii=False).replace("\\n", ""))


def test_log_of_an_attempt_cannot_control_the_terminal() -> None:
    pages = [httpx2.Response(200, json={"attempt": 1, "text": text, "next_offset": 9}) for text in (f"loss 1.0\n{TITLE}{CLIPBOARD}", "")]
    done, _ = run_command("logs", JOB_ID, replies=[*pages])
    assert "␛]0;owned" in done.output
    assert "\x1b" not in done.output


def test_followed_log_cannot_control_the_terminal() -> None:
    part = json.dumps({"attempt": 1, "text": f"a{CLIPBOARD}b", "offset": 9})
    stream = f"id: 1:9\ndata: {part}\n\nevent: done\ndata: {{}}\n\n"
    service = FakeService(httpx2.Response(200, text=stream, headers={"Content-Type": "text/event-stream"}))
    assert [part["text"] for part in service.client.follow_log(JOB_ID, None)] == ["a␛]52;c;cm0gLXJm␛\\b"]


def test_error_message_cannot_control_the_terminal() -> None:
    body = {"error": {"code": "not_found", "message": f"no job {TITLE}", "hint": CLIPBOARD, "param": None}}
    done, _ = run_command("show", JOB_ID, replies=[httpx2.Response(404, json=body)])
    assert "\x1b" not in str(done.exception)
