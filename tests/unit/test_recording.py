"""The recording of commands in a terminal: what it keeps of a screen, and the image that it makes."""

import itertools
import os
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from infra.recording import LAST_FRAME_S, MAX_DURATION_S, MIN_FRAME_S, Frame, Lines, Run, Terminal, render_svg, shorten, split_commands


def lines(text: str) -> Lines:
    return ((Run(0, text, "default", False),), ())


@pytest.fixture
def terminal(tmp_path: Path) -> Terminal:
    terminal = Terminal(columns=30, rows=6)
    script = "print('a line'); print('\\x1b[32mgreen\\x1b[0m'); print('\\x1b[1A\\x1b[2Kover it')"
    assert terminal.run([sys.executable, "-c", script], "demo", dict(os.environ), tmp_path) == 0
    return terminal


def text_of(frame: Frame) -> list[str]:
    return ["".join(run.text for run in line) for line in frame.lines if line]


def test_recording_shows_what_the_command_leaves_on_the_screen(terminal: Terminal) -> None:
    assert text_of(terminal.frames[-1]) == ["$ demo", "a line", "over it"]
    assert text_of(terminal.frames[1]) == ["$ d"]


def test_failing_command_is_reported(tmp_path: Path) -> None:
    assert Terminal(20, 4).run([sys.executable, "-c", "raise SystemExit(3)"], "fail", dict(os.environ), tmp_path) == 3


def test_long_recording_is_played_faster_and_without_flashes() -> None:
    frames = [Frame(float(second * 10), lines(str(second))) for second in range(1000)]
    shortened = shorten(frames)
    assert shortened[-1].at_s <= MAX_DURATION_S
    assert shortened[-1].lines == lines("999")
    gaps = [after.at_s - before.at_s for before, after in itertools.pairwise(shortened)]
    assert min(gaps) >= MIN_FRAME_S


def test_short_pause_keeps_its_length() -> None:
    assert [frame.at_s for frame in shorten([Frame(3.0, lines("a")), Frame(3.25, lines("b"))])] == [0.0, 0.25]


def test_image_has_each_line_once_and_loads_nothing() -> None:
    frames = [Frame(0.0, lines("<a & b>")), Frame(1.0, lines("<a & b>")), Frame(2.0, lines("c"))]
    image = render_svg(frames, "a title")
    root = ET.fromstring(image)
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts == ["a title", "<a & b>", "c"]
    assert f"{2.0 + LAST_FRAME_S:.2f}s step-end" in image
    assert "http" not in image.replace("http://www.w3.org/2000/svg", "")


def test_commands_are_separated_by_two_dashes() -> None:
    assert split_commands(["--", "a", "-x", "--", "b"]) == [["a", "-x"], ["b"]]
