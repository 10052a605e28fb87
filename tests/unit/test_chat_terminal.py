"""The interactive chat in a real terminal: banner, commands, history, and Ctrl-C."""

import os
import pty
import select
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"
TIMEOUT_S = 20.0


class Terminal:
    """A terminal with a program in it."""

    def __init__(self, master: int, process: "subprocess.Popen[bytes]") -> None:
        self._master = master
        self._process = process
        self._unread = ""
        self.output = ""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def interrupt_prompt(self, text: str) -> None:
        """Press Ctrl-C at the prompt until the program writes this. Python's readline misses a signal right before it waits for a key."""
        for _ in range(3):
            self.type(CTRL_C)
            if self._read_until(text, timeout_s=4.0):
                return
        raise AssertionError(f"{text!r} was not written after: {self.output[-500:]!r}")

    def wait_for(self, text: str) -> None:
        """Read until the program has written this, after what was waited for before."""
        assert self._read_until(text, TIMEOUT_S), f"{text!r} was not written after: {self.output[-500:]!r}"

    def _read_until(self, text: str, timeout_s: float) -> bool:
        """Whether the program wrote this; the time counts from its last output."""
        while text not in self._unread:
            if not select.select([self._master], [], [], timeout_s)[0]:
                return False
            written = os.read(self._master, 65536).decode(errors="replace")
            self.output += written
            self._unread += written
        self._unread = self._unread.partition(text)[2]
        return True

    def wait_until_prompt(self) -> None:
        self.wait_for("> ")

    def wait_for_exit(self) -> int:
        return self._process.wait(TIMEOUT_S)


@contextmanager
def open_terminal(*arguments: str, columns: int = 80) -> Iterator[Terminal]:
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, columns))
    command = [sys.executable, "-m", "tests.unit.endless_chat", *arguments]
    environment = {"PATH": os.environ["PATH"], "TERM": "xterm", "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, cwd=REPOSITORY, env=environment)
    os.close(slave)
    try:
        yield Terminal(master, process)
    finally:
        process.kill()
        process.wait()
        os.close(master)


def test_interrupt_ends_the_answer_and_keeps_what_was_said(tmp_path: Path) -> None:
    with open_terminal(str(tmp_path / "history")) as terminal:
        terminal.wait_for("the endless model (a test)")
        terminal.wait_for("Ctrl-D leaves")
        terminal.wait_until_prompt()
        terminal.type("first\n")
        terminal.wait_for("1 messages word")
        terminal.type(CTRL_C)
        terminal.wait_until_prompt()
        terminal.type("second\n")
        terminal.wait_for("3 messages word")  # the question, the answer until then, and the new question
        terminal.type(CTRL_C)
        terminal.wait_until_prompt()
        terminal.type("/reset\n")
        terminal.wait_for("forgotten")
        terminal.wait_until_prompt()
        terminal.type("third\n")
        terminal.wait_for("1 messages word")
        terminal.type(CTRL_C)
        terminal.wait_until_prompt()
        terminal.type(CTRL_D)
        assert terminal.wait_for_exit() == 0


def test_commands(tmp_path: Path) -> None:
    with open_terminal(str(tmp_path / "history")) as terminal:
        terminal.wait_until_prompt()
        for line, shown in [
            ("/help", "/reset"),
            ("/system no", "error: System role not supported"),
            ("/system Be brief.", "system: Be brief."),
            ("/nothing", "no command /nothing"),
        ]:
            terminal.type(f"{line}\n")
            terminal.wait_for(f"\n{shown}")
            terminal.wait_until_prompt()
        terminal.type("\n")
        terminal.wait_until_prompt()
        terminal.type(" /path\n")
        terminal.wait_for("2 messages word")  # with the system message
        terminal.type(CTRL_C)
        terminal.wait_until_prompt()
        terminal.type("/exit\n")
        assert terminal.wait_for_exit() == 0


def test_second_interrupt_at_the_prompt_leaves(tmp_path: Path) -> None:
    with open_terminal(str(tmp_path / "history")) as terminal:
        terminal.wait_until_prompt()
        terminal.type("half a line")
        terminal.wait_for("half a line")
        terminal.interrupt_prompt("Ctrl-C again")
        terminal.wait_until_prompt()
        terminal.interrupt_prompt("bye")
        assert terminal.wait_for_exit() == 0
        assert "messages" not in terminal.output


def test_history_is_kept_for_its_owner_alone(tmp_path: Path) -> None:
    history = tmp_path / "home/history"
    for _ in range(2):
        with open_terminal(str(history)) as terminal:
            terminal.wait_until_prompt()
            terminal.type(f"{UP}\n" if history.exists() else "remember me\n")
            terminal.wait_for("1 messages word")
            terminal.type(CTRL_C)
            terminal.wait_until_prompt()
            terminal.type(CTRL_D)
            assert terminal.wait_for_exit() == 0
        assert history.stat().st_mode & 0o777 == 0o600
        assert "remember me" in history.read_text().splitlines()


def test_answers_follow_each_other_in_a_narrow_terminal(tmp_path: Path) -> None:
    with open_terminal(str(tmp_path / "history"), "base", "tuned") as terminal:
        terminal.wait_for("base: a test; tuned: a test")
        terminal.wait_until_prompt()
        terminal.type("go\n")
        terminal.wait_for("base: 1 messages word")
        terminal.type(CTRL_C)
        terminal.wait_until_prompt()
        assert "tuned: 1" not in terminal.output  # one interrupt ends the turn


def test_answers_stand_side_by_side_in_a_wide_terminal(tmp_path: Path) -> None:
    with open_terminal(str(tmp_path / "history"), "base", "tuned", columns=120) as terminal:
        terminal.wait_until_prompt()
        terminal.type("go\n")
        terminal.wait_for("1 messages word")
        [heading] = [line for line in terminal.output.splitlines() if "base" in line and "tuned" in line and "a test" not in line][:1]
        assert heading.index("tuned") - heading.index("base") > 40
        terminal.type(CTRL_C)
        terminal.wait_until_prompt()
        terminal.type(CTRL_D)
        assert terminal.wait_for_exit() == 0
