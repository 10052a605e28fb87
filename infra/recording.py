"""Records commands in a terminal as an animated SVG image: `python -m infra.recording --output FILE -- COMMAND [-- COMMAND …]`.

Each command runs for real, in a terminal of a fixed size, and what it draws is kept with its time. Pauses are shortened, so that minutes of
training become seconds; nothing else is changed. The image loads nothing from elsewhere. Run it with the development environment's Python.
"""

import argparse
import fcntl
import os
import pty
import re
import select
import shlex
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from xml.sax.saxutils import escape

import pyte

COLUMNS, ROWS = 100, 30
PROMPT = "$ "
KEYSTROKE_S = 0.05
READ_S = 0.1  # between two looks at the screen
MAX_PAUSE_S = 0.6  # a longer wait is shown as this
MAX_DURATION_S = 30.0  # of the animation: a longer recording is played faster
MIN_FRAME_S = 0.12  # what is shown for a shorter time is left out
LAST_FRAME_S = 6.0  # before the animation starts again
TIMEOUT_S = 900.0  # of one command

CHARACTER_WIDTH, LINE_HEIGHT, FONT_SIZE, MARGIN, TITLE_HEIGHT = 8.4, 18, 14, 14, 32
COLORS = {
    "default": "#d4d4d4",
    "black": "#6b6b6b",
    "red": "#f28b82",
    "green": "#8bd49c",
    "brown": "#e8c877",  # pyte's name for yellow
    "blue": "#8ab4f8",
    "magenta": "#c58af9",
    "cyan": "#78d9ec",
    "white": "#ffffff",
}
BACKGROUND, TITLE_COLOR = "#1e1e1e", "#9aa0a6"


@dataclass(frozen=True)
class Run:
    """Characters of one line that look alike."""

    column: int
    text: str
    color: str
    bold: bool


Lines = tuple[tuple[Run, ...], ...]


@dataclass(frozen=True)
class Frame:
    """What the screen shows from a time on, in seconds since the recording began."""

    at_s: float
    lines: Lines


class Terminal:
    """A screen on which commands are typed and run, one after the other. Its frames are what it showed."""

    def __init__(self, columns: int = COLUMNS, rows: int = ROWS) -> None:
        self.columns, self.rows = columns, rows
        self.screen = pyte.Screen(columns, rows)
        self.screen.set_mode(pyte.modes.LNM)
        self.frames: list[Frame] = []
        self._stream = pyte.ByteStream(self.screen)
        self._started_at = time.monotonic()
        self._typed_s = 0.0  # nobody waits for the keystrokes: they only have a time in the recording

    def run(self, command: Sequence[str], shown: str, environment: dict[str, str], folder: Path) -> int:
        """Type a command as `shown`, run it and return its exit code. Raises TimeoutExpired."""
        for character in PROMPT + shown:
            self._stream.feed(character.encode())
            self._typed_s += KEYSTROKE_S
            self._keep_frame()
        self._stream.feed(b"\r\n")
        parent, child = pty.openpty()
        fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", self.rows, self.columns, 0, 0))
        variables = {**environment, "TERM": "xterm-256color", "COLUMNS": str(self.columns), "LINES": str(self.rows)}
        process = subprocess.Popen(command, stdin=child, stdout=child, stderr=child, env=variables, cwd=folder, close_fds=True)
        os.close(child)
        try:
            self._show_output(parent, process)
        finally:
            os.close(parent)
            process.kill()
        return process.wait()

    def _show_output(self, terminal: int, process: "subprocess.Popen[bytes]") -> None:
        deadline_at = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline_at:
            if select.select([terminal], [], [], READ_S)[0]:
                try:
                    output = os.read(terminal, 1 << 16)
                except OSError:  # the command has closed its terminal
                    output = b""
                if not output:
                    process.wait()
                    self._keep_frame()
                    return
                self._stream.feed(output)
            elif process.poll() is not None:
                self._keep_frame()
                return
            else:
                self._keep_frame()
        raise subprocess.TimeoutExpired(process.args, TIMEOUT_S)

    def _keep_frame(self) -> None:
        lines = read_screen(self.screen)
        if not self.frames or self.frames[-1].lines != lines:
            self.frames.append(Frame(time.monotonic() - self._started_at + self._typed_s, lines))


def read_screen(screen: pyte.Screen) -> Lines:
    """The characters on the screen, in runs that look alike."""
    return tuple(tuple(_read_line(screen.buffer[row], screen.columns)) for row in range(screen.lines))


def _read_line(line: "pyte.screens.StaticDefaultDict[int, pyte.screens.Char]", columns: int) -> Iterator[Run]:
    cells = [(column, line[column]) for column in range(columns)]
    for (color, bold), group in groupby(cells, key=lambda cell: (cell[1].fg, cell[1].bold)):
        run = list(group)
        text = "".join(character.data for _, character in run)
        if text.strip():
            yield Run(run[0][0], text.rstrip(), color, bold)


def shorten(frames: Sequence[Frame]) -> list[Frame]:
    """The frames of a recording in a time that one watches: shorter pauses, faster if it is still long, and without what only flashes."""
    pauses_s = [min(after.at_s - before.at_s, MAX_PAUSE_S) for before, after in pairwise(frames)]
    speed = max(1.0, sum(pauses_s) / MAX_DURATION_S)
    times_s = [0.0, *(at_s / speed for at_s in accumulate(pauses_s))]
    kept: list[Frame] = []
    for at_s, frame in zip(times_s, frames, strict=True):
        if kept and at_s - kept[-1].at_s < MIN_FRAME_S:
            kept[-1] = Frame(kept[-1].at_s, frame.lines)
        else:
            kept.append(Frame(at_s, frame.lines))
    return kept


def render_svg(frames: Sequence[Frame], title: str, columns: int = COLUMNS, rows: int = ROWS) -> str:
    """The frames as an animation that repeats. All frames lie side by side, and a step moves the next one into view."""
    width, height = round(columns * CHARACTER_WIDTH + 2 * MARGIN), rows * LINE_HEIGHT + 2 * MARGIN + TITLE_HEIGHT
    total_s = frames[-1].at_s + LAST_FRAME_S
    numbers = {line: number for number, line in enumerate(dict.fromkeys(line for frame in frames for line in frame.lines if line))}
    lines = "".join(f'<g id="l{number}">{"".join(map(_render_run, line))}</g>' for line, number in numbers.items())
    steps = "".join(f"{frame.at_s / total_s:.3%}{{transform:translateX({-index * width}px)}}" for index, frame in enumerate(frames))
    body = "".join(
        f'<use href="#l{numbers[line]}" x="{index * width}" y="{(row + 1) * LINE_HEIGHT}"/>'
        for index, frame in enumerate(frames)
        for row, line in enumerate(frame.lines)
        if line
    )
    buttons = "".join(
        f'<circle cx="{18 + 20 * n}" cy="17" r="6" fill="{color}"/>' for n, color in enumerate(("#ff5f57", "#febc2e", "#28c840"))
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f"<title>{escape(title)}</title>"
        f"<style>text{{font:{FONT_SIZE}px 'DejaVu Sans Mono',Menlo,Consolas,monospace;white-space:pre}}"
        f"#frames{{animation:play {total_s:.2f}s step-end infinite}}@keyframes play{{{steps}}}</style>"
        f'<rect width="100%" height="100%" rx="8" fill="{BACKGROUND}"/>{buttons}'
        f'<text x="{width / 2:.0f}" y="22" text-anchor="middle" fill="{TITLE_COLOR}">{escape(title)}</text><defs>{lines}</defs>'
        f'<svg x="{MARGIN}" y="{TITLE_HEIGHT}" width="{width - 2 * MARGIN}" height="{height - TITLE_HEIGHT}">'
        f'<g id="frames">{body}</g></svg></svg>\n'
    )


def _render_run(run: Run) -> str:
    """A run in its columns. `textLength` keeps them straight in a font of another width."""
    color = COLORS.get(run.color.removeprefix("bright"), f"#{run.color}" if re.fullmatch("[0-9a-f]{6}", run.color) else COLORS["default"])
    weight = ' font-weight="bold"' if run.bold else ""
    x, length = run.column * CHARACTER_WIDTH, len(run.text) * CHARACTER_WIDTH
    return f'<text x="{x:.1f}" textLength="{length:.1f}" fill="{color}"{weight}>{escape(run.text)}</text>'


def split_commands(words: Sequence[str]) -> list[list[str]]:
    """The words between `--` as commands."""
    return [list(group) for is_separator, group in groupby(words, key=lambda word: word == "--") if not is_separator]


def main() -> int:
    """Record the commands of the command line; 1 if one of them fails."""
    options, separator, commands = sys.argv[1:], "--", []
    if separator in options:
        index = options.index(separator)
        options, commands = options[:index], split_commands(options[index:])
    parser = argparse.ArgumentParser(prog="python -m infra.recording", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="the SVG file to write")
    parser.add_argument("--title", default="tunesmith", help="shown above the terminal")
    parser.add_argument("--folder", type=Path, default=Path(), help="the folder in which the commands run")
    arguments = parser.parse_args(options)
    if not commands:
        parser.error("no command; write it after --")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    terminal = Terminal()
    for command in commands:
        if terminal.run(command, shlex.join(command), environment, arguments.folder):
            print(f"{shlex.join(command)} failed", file=sys.stderr)
            return 1
    arguments.output.write_text(render_svg(shorten(terminal.frames), arguments.title))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
