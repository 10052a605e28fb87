"""The ingestion in a process of its own: what the service gets from a real child of the environment `data`, also when it fails."""

import io
import json
import os
import time
from pathlib import Path

import pytest

from schema.ingestion import IngestLimits, IngestOptions, IngestTask, InputFile
from service.adapters.ingester import ProcessIngester
from service.core.datasets.ports import IngestTimeout
from service.core.errors import DiskFull, InvalidRequest, Unavailable
from service.setting_types import SOURCE_ROOT

PYTHON = SOURCE_ROOT / ".venvs/data/bin/python"
ROW = b'{"prompt": "question %d", "completion": "answer"}\n'


def make_task(folder: Path, content: bytes, **changes: object) -> IngestTask:
    source = folder / "source"
    source.write_bytes(content)
    output = folder / "output"
    output.mkdir()
    fields = {"files": (InputFile(path=str(source), name="rows.jsonl"),), "output": str(output)}
    return IngestTask.model_validate(fields | changes)


def make_ingester(source: Path = SOURCE_ROOT, python: Path = PYTHON) -> ProcessIngester:
    return ProcessIngester(python=python, variables={"PATH": os.environ["PATH"], "SECRET": "1"}, source=source)


def make_program(folder: Path, code: str) -> Path:
    """A folder in which `jobs.ingest` is another program."""
    module = folder / "source-tree/jobs/ingest"
    module.mkdir(parents=True)
    (module / "__main__.py").write_text(code)
    return folder / "source-tree"


def test_child_writes_splits_and_outcome(tmp_path: Path) -> None:
    task = make_task(tmp_path, b"".join(ROW % number for number in range(20)))
    outcome = make_ingester().ingest(task)
    assert outcome.rows is not None
    assert {name: split.rows for name, split in outcome.rows.splits.items()} == {"train": 18, "eval": 2}
    lines = (tmp_path / "output/train.jsonl").read_bytes().splitlines()
    assert json.loads(lines[0]) == {"prompt": "question 0", "completion": "answer"}


def test_child_tells_what_is_wrong_with_rows_and_keeps_nothing(tmp_path: Path) -> None:
    outcome = make_ingester().ingest(make_task(tmp_path, b'{"text": "a"}\n{"text": 1}\n'))
    assert (outcome.rows, [problem.line for problem in outcome.problems]) == (None, [2])
    assert not list((tmp_path / "output").glob("*.jsonl"))


def test_child_sees_no_secret_of_the_service(tmp_path: Path) -> None:
    code = "import os, pathlib, sys\noutcome = '{\"rows_read\": %d}' % (1 if 'SECRET' in os.environ else 2)\n"
    code += "pathlib.Path(sys.argv[1]).with_name('outcome.json').write_text(outcome)"
    outcome = make_ingester(make_program(tmp_path, code)).ingest(make_task(tmp_path, b""))
    assert outcome.rows_read == 2


def test_slow_child_is_ended_with_its_workers(tmp_path: Path) -> None:
    code = "import os, pathlib, subprocess, sys, time\nworker = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    code += "pathlib.Path(sys.argv[1]).with_name('pid').write_text(str(worker.pid))\ntime.sleep(600)"
    task = make_task(tmp_path, b"")
    with pytest.raises(IngestTimeout):
        make_ingester(make_program(tmp_path, code)).ingest(task, timeout_s=4)
    worker = int((tmp_path / "output/pid").read_text())
    assert is_ended(worker)


def is_ended(pid: int) -> bool:
    """Whether a process has ended, or does so within seconds."""
    for _ in range(200):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_file_beyond_the_memory_limit_is_refused(tmp_path: Path) -> None:
    code = "import resource\nresource.setrlimit(resource.RLIMIT_AS, (1 << 28, 1 << 28))\nbytearray(1 << 30)"
    task = make_task(tmp_path, b"", limits=IngestLimits(max_memory_bytes=256 << 20))
    with pytest.raises(InvalidRequest, match="more than the 256 MiB of memory") as excinfo:
        make_ingester(make_program(tmp_path, code)).ingest(task)
    assert "split it" in excinfo.value.hint


def test_crash_is_unavailable_and_keeps_its_output_for_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(Unavailable, match="error in this deployment"):
        make_ingester(make_program(tmp_path, "raise RuntimeError('some fault')")).ingest(make_task(tmp_path, b""))
    (record,) = [record for record in caplog.records if record.message == "ingestion failed"]
    assert "some fault" in record.output  # type: ignore[attr-defined]


def test_child_that_is_killed_is_explained_as_memory(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="memory"):
        make_ingester(make_program(tmp_path, "import os\nos.kill(os.getpid(), 9)")).ingest(make_task(tmp_path, b""))


def test_full_disk_is_reported(tmp_path: Path) -> None:
    with pytest.raises(DiskFull):
        make_ingester(make_program(tmp_path, "raise OSError(28, 'No space left on device')")).ingest(make_task(tmp_path, b""))


def test_missing_environment_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="cannot read datasets") as excinfo:
        make_ingester(python=tmp_path / "python").ingest(make_task(tmp_path, b""))
    assert "make setup-data" in excinfo.value.hint


def test_a_check_keeps_nothing(tmp_path: Path) -> None:
    stream = io.BytesIO(b"".join(ROW % number for number in range(20)))
    options = IngestOptions(eval_fraction=0.5)  # type: ignore[call-arg]
    outcome = make_ingester().ingest(make_task(tmp_path, stream.getvalue(), check_only=True, options=options))
    assert (outcome.rows_read, outcome.problem_count, len(outcome.samples)) == (20, 0, 3)
    assert {path.name for path in (tmp_path / "output").iterdir()} == {"task.json", "outcome.json"}
