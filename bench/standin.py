"""A trainer's environment that trains nothing: each attempt holds its slot and sleeps.

For benchmarks of the service alone. It is an interpreter, as `TUNESMITH_TRAINER_PYTHON` must be, that runs the two
modules below instead of `jobs.llm.probe` and `jobs.run`; each attempt leaves its token in its own working folder.
"""

import sys
from pathlib import Path

PROBE_SCRIPT = 'print(\'{"device": "cpu", "device_name": "stand-in", "gguf": true, "flash_attention_2": false}\')\n'
ATTEMPT_SCRIPT = """\
import os, pathlib, time
token = pathlib.Path(os.environ["JOB_WORKDIR"], "token")
token.with_suffix(".part").write_text(os.environ["JOB_TOKEN"])
token.with_suffix(".part").rename(token)
print("attempt started", flush=True)
time.sleep(3600)
"""
# The launcher knows attempts by their command line, so it has to be just what a real one has.
INTERPRETER_SCRIPT = """\
#!{python} -S
import os, sys
os.chdir({folder!r})
os.execve({python!r}, [{python!r}, *sys.argv[1:]], {{**os.environ, "PYTHONPATH": {folder!r}}})
"""


def make_stub_trainer(folder: Path) -> Path:
    """Write the stand-in below `folder`; returns what to use as the trainer's Python."""
    jobs = folder / "jobs"
    jobs.mkdir(parents=True, exist_ok=True)
    (jobs / "__init__.py").touch()
    (jobs / "probe.py").write_text(PROBE_SCRIPT)
    (jobs / "run.py").write_text(ATTEMPT_SCRIPT)
    interpreter = folder / "python"
    interpreter.write_text(INTERPRETER_SCRIPT.format(python=sys.executable, folder=str(folder)))
    interpreter.chmod(0o755)
    return interpreter
