"""A stub of the trainer's environment for benchmarks of the service alone: each attempt occupies its slot and sleeps.

The stub is an interpreter, as `TUNESMITH_TRAINER_PYTHON` must be. It runs the two modules below instead of
`jobs.llm.probe` and `jobs.run`. Each attempt writes its token into its working folder.
"""

import sys
from pathlib import Path

PROBE_SCRIPT = 'print(\'{"device": "cpu", "device_name": "stub", "gguf": true, "flash_attention_2": false}\')\n'
ATTEMPT_SCRIPT = """\
import os, pathlib, time
token = pathlib.Path(os.environ["JOB_WORKDIR"], "token")
token.with_suffix(".part").write_text(os.environ["JOB_TOKEN"])
token.with_suffix(".part").rename(token)
print("attempt started", flush=True)
time.sleep(3600)
"""
# The launcher finds attempts by their command line, which must therefore equal that of a real one.
INTERPRETER_SCRIPT = """\
#!{python} -S
import os, sys
os.chdir({folder!r})
os.execve({python!r}, [{python!r}, *sys.argv[1:]], {{**os.environ, "PYTHONPATH": {folder!r}}})
"""


def make_stub_trainer(folder: Path) -> Path:
    """Write the stub below `folder`; returns the path to use as the trainer's Python."""
    jobs = folder / "jobs"
    (jobs / "llm").mkdir(parents=True, exist_ok=True)
    (jobs / "__init__.py").touch()
    (jobs / "llm/__init__.py").touch()
    (jobs / "llm/probe.py").write_text(PROBE_SCRIPT)
    (jobs / "run.py").write_text(ATTEMPT_SCRIPT)
    interpreter = folder / "python"
    interpreter.write_text(INTERPRETER_SCRIPT.format(python=sys.executable, folder=str(folder)))
    interpreter.chmod(0o755)
    return interpreter
