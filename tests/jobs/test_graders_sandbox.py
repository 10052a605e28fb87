"""Python graders: what works in the sandbox, attempts to escape from it, and attempts to exhaust resources."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from jobs.llm.graders.base import FailedGrade, GradingInput
from jobs.llm.graders.python import SandboxedPythonGrader
from jobs.runtime.errors import JobFailed
from schema.training.llm_graders import PythonGrader

Make = Callable[..., SandboxedPythonGrader]

TIMEOUT_FAILURE = FailedGrade("it took longer than its timeout_s")
MEMORY_FAILURE = FailedGrade("it used more than its memory_mb, or printed too much")


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[SandboxedPythonGrader] = []

    def build(source: str, *, timeout_s: float = 0.3, memory_mb: int = 32) -> SandboxedPythonGrader:
        config = PythonGrader(name="g", type="python", source=source, timeout_s=timeout_s, memory_mb=memory_mb)
        made.append(SandboxedPythonGrader(config, tmp_path))
        return made[-1]

    yield build
    for grader in made:
        grader.close()


def make_grader_source(code: str) -> str:
    """The source of a grader that runs this code and then returns 1."""
    lines = "".join(f"    {line}\n" for line in code.splitlines())
    return f"def grade(completion, row):\n{lines}    return 1\n"


def grade(grader: SandboxedPythonGrader, completion: str = "c", **row: object) -> float | FailedGrade:
    return grader.grade([GradingInput("the prompt", completion, row)])[0]


def test_function_grades_with_row_and_prompt(make: Make) -> None:
    source = """
import re
from dataclasses import dataclass

@dataclass
class Weights:
    right: float = 0.75
    short: float = 0.25

def is_right(completion, answer):
    return any(number == str(answer) for number in re.findall(r"\\d+", completion))

def grade(completion, row):
    weights = Weights()
    score = sum([weights.right * is_right(completion, row["answer"]), weights.short * (len(completion) < 10)])
    match row["prompt"]:
        case "the prompt":
            return score
        case _:
            return 0
"""
    grader = make(source)
    grader.check([])
    assert grader.grade(
        [GradingInput("the prompt", "it is 4", {"answer": 4}), GradingInput("the prompt", "it is not known to me", {"answer": 4})]
    ) == [
        1.0,
        0.0,
    ]


def test_calls_share_no_state(make: Make) -> None:
    grader = make("seen = []\n\ndef grade(completion, row):\n    seen.append(completion)\n    return len(seen)")
    assert grader.grade([GradingInput("p", "c")] * 3) == [1.0, 1.0, 1.0]


def test_random_is_deterministic(make: Make) -> None:
    grader = make("import random\n\ndef grade(completion, row):\n    return random.random()")
    assert len(set(grader.grade([GradingInput("p", "c")] * 3))) == 1


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("def grade(completion, row:\n    return 1", "is not Python that the sandbox supports"),
        ("def score(completion, row):\n    return 1", "does not define grade"),
        ("import numpy\ndef grade(completion, row):\n    return 1", "No module named 'numpy'"),
        ("def grade(completion, row):\n    yield 1", "does not yet support yield"),
        ("while True:\n    pass", "time limit"),
    ],
)
def test_invalid_source_fails_before_training(make: Make, source: str, reason: str) -> None:
    with pytest.raises(JobFailed, match=reason) as failed:
        make(source).check([])
    assert failed.value.failure.code == "invalid_config"


NO_GRADES = ["None", "'1'", "'9' * 400", "float('nan')", "float('inf')", "10**400", "-(10**400)", "[1]", "{'score': 1}"]


@pytest.mark.parametrize("value", NO_GRADES)
def test_non_finite_grade_is_a_failure(make: Make, value: str) -> None:
    assert grade(make(f"def grade(completion, row):\n    return {value}")) == FailedGrade("grade did not return a finite number")


def test_error_names_line_but_not_row_data(make: Make) -> None:
    source = "def grade(completion, row):\n    raise ValueError(row['secret'])"
    assert grade(make(source), secret="private") == FailedGrade("ValueError in line 2")


ESCAPES = {
    "subclasses": "().__class__.__base__.__subclasses__()",
    "getattr": "getattr(int, '__subclasses__')()",
    "mro": "int.mro()",
    "globals": "grade.__globals__",
    "code": "grade.__code__",
    "closure": "(lambda: 0).__closure__",
    "frames": "try:\n    1 / 0\nexcept Exception as error:\n    error.__traceback__.tb_frame.f_globals",
    "builtins": "__builtins__",
    "import": "__import__('os').system('id')",
    "os.system": "import os\nos.system('id')",
    "os.listdir": "import os\nos.listdir('/')",
    "os.environ": "import os\nos.environ['HOME']",
    "os.getenv": "import os\nos.getenv('HOME')",
    "os.urandom": "import os\nos.urandom(8)",
    "sys.modules": "import sys\nsys.modules",
    "open": "open('/etc/passwd').read()",
    "write": "open('/tmp/written', 'w').write('x')",
    "pathlib": "from pathlib import Path\nPath('/etc/passwd').read_text()",
    "proc": "open('/proc/self/environ').read()",
    "socket": "import socket",
    "urllib": "import urllib.request",
    "subprocess": "import subprocess",
    "ctypes": "import ctypes",
    "threading": "import threading",
    "multiprocessing": "import multiprocessing",
    "importlib": "import importlib",
    "pickle": "import pickle",
    "gc": "import gc\ngc.get_objects()",
    "inspect": "import inspect",
    "jobs": "import jobs",
    "torch": "import torch",
    "exec": "exec('import os; os.system(\"id\")')",
    "eval": "eval('open(\"/etc/passwd\")')",
    "compile": "compile('1', 'x', 'eval')",
    "breakpoint": "breakpoint()",
    "input": "input()",
    "monkeypatching": "import json\njson.loads = lambda text: 1",
    "patching a type": "str.upper = lambda self: self",
    "format": "'{0.__class__.__init__.__globals__}'.format(grade)",
}


@pytest.mark.parametrize("attack", ESCAPES.values(), ids=ESCAPES)
def test_sandbox_escapes_fail(make: Make, attack: str) -> None:
    failed = grade(make(make_grader_source(attack)))
    assert isinstance(failed, FailedGrade)
    assert "in line" in failed.reason  # an exception inside the sandbox, not a crash


# A product of two large numbers cannot be interrupted: when it exceeds the time limit, the process is killed.
KILLED_FAILURE = FailedGrade("the sandbox was killed because it exceeded its limits")

RESOURCE_ATTACKS: dict[str, tuple[str, *tuple[FailedGrade, ...]]] = {
    "loop": ("while True:\n    pass", TIMEOUT_FAILURE),
    "loop that catches": (
        "while True:\n    try:\n        while True:\n            pass\n    except BaseException:\n        pass",
        TIMEOUT_FAILURE,
    ),
    "list": ("x = []\nwhile True:\n    x.append('a' * 10**6)", MEMORY_FAILURE),
    "list that catches": (
        "x = []\nwhile True:\n    try:\n        x.append('a' * 10**6)\n    except BaseException:\n        pass",
        MEMORY_FAILURE,
    ),
    "string": ("'a' * 10**12", MEMORY_FAILURE),
    "power": ("10**10**10", MEMORY_FAILURE),
    "squares": ("x = 3\nwhile True:\n    x = x * x", MEMORY_FAILURE, KILLED_FAILURE),
    "shift": ("1 << 10**12", MEMORY_FAILURE),
    "padding": ("f'{1:>1000000000000}'", MEMORY_FAILURE),
    "printing": ("while True:\n    print('x' * 10**6)", MEMORY_FAILURE),
    "sorted": ("sorted(range(10**9))", MEMORY_FAILURE),
    "nested": ("x = []\nwhile True:\n    x = [x]", MEMORY_FAILURE),
    "recursion": ("def f(n):\n    return f(n + 1)\nf(0)", FailedGrade("RecursionError in line 3")),
    "regex": ("import re\nre.match(r'(a*)*\\1$', 'a' * 4000 + 'b')", FailedGrade("error in line 3")),
}


@pytest.mark.parametrize("name", RESOURCE_ATTACKS)
def test_limits_are_enforced(make: Make, name: str) -> None:
    attack, *expected = RESOURCE_ATTACKS[name]
    grader = make(make_grader_source(attack), memory_mb=16)
    began = time.monotonic()
    result = grade(grader)
    assert result in expected
    assert time.monotonic() - began < 5
    assert sum(child.memory_info().rss for child in find_sandboxes()) < 16 * 2**20 + 200 * 2**20


def test_sleep_returns_immediately(make: Make) -> None:
    began = time.monotonic()
    assert grade(make(make_grader_source("import time\ntime.sleep(3600)"))) == 1.0
    assert time.monotonic() - began < 5


def test_deeply_nested_source_does_not_crash(make: Make) -> None:
    with pytest.raises(JobFailed):
        make("x = " + "(" * 30_000 + ")" * 30_000).check([])


def test_killed_sandbox_is_a_failure_and_is_replaced(make: Make) -> None:
    grader = make("def grade(completion, row):\n    while completion == 'wait':\n        pass\n    return 1", timeout_s=20)
    assert grade(grader) == 1.0
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(grade, grader, "wait")
        time.sleep(0.1)
        for child in find_sandboxes():
            os.kill(child.pid, signal.SIGKILL)
        assert waiting.result() == KILLED_FAILURE
    assert grade(grader) == 1.0


def test_sandbox_process_has_own_limits_and_no_environment(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second line of defense: code that escapes from the interpreter finds no secret to read and no file to write."""
    monkeypatch.setenv("JOB_TOKEN", "the attempt's")
    assert grade(make("def grade(completion, row):\n    return 1")) == 1.0
    [child, *_] = find_sandboxes()
    assert child.environ() == {}
    limits = Path(f"/proc/{child.pid}/limits").read_text()
    soft = {line[:26].strip(): line[26:].split()[0] for line in limits.splitlines()[1:]}
    assert soft["Max file size"] == "0"
    assert soft["Max core file size"] == "0"
    assert soft["Max open files"] == "16"
    assert soft["Max address space"] == str((32 + 256) << 20)


def test_closing_ends_the_sandboxes(make: Make) -> None:
    grader = make("def grade(completion, row):\n    return 1")
    assert grade(grader) == 1.0
    sandboxes = find_sandboxes()
    assert sandboxes
    grader.close()
    assert not psutil.wait_procs(sandboxes, timeout=5)[1]


def find_sandboxes() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if "monty" in child.name()]
