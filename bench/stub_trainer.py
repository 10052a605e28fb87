"""A stub of the trainer's environment for benchmarks of the service alone: each attempt occupies its slot and sleeps.

The stub is a folder with a virtual environment's interpreter and a manifest, as the local launcher expects them. The interpreter runs
the module below instead of `jobs.run`. Each attempt writes its token into its working folder.
"""

import sys
from pathlib import Path

from schema.capabilities import MANIFEST_FILE, EnvironmentManifest, FamilyCapabilities
from schema.training import TRAINER_TYPES

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


def make_stub_trainer(folder: Path) -> dict[str, str]:
    """Write the stub below `folder`; returns the settings that make the local launcher use it."""
    (folder / "jobs").mkdir(parents=True, exist_ok=True)
    (folder / "jobs/__init__.py").touch()
    (folder / "jobs/run.py").write_text(ATTEMPT_SCRIPT)
    write_interpreter(folder, INTERPRETER_SCRIPT.format(python=sys.executable, folder=str(folder)))
    return write_manifest(folder)


def write_interpreter(folder: Path, script: str) -> None:
    """Write the interpreter of the environment `llm`."""
    interpreter = folder / "venvs/llm/bin/python"
    interpreter.parent.mkdir(parents=True, exist_ok=True)
    interpreter.write_text(script)
    interpreter.chmod(0o755)


def write_manifest(folder: Path) -> dict[str, str]:
    """Write the manifest of an environment that can do everything on a processor; returns the launcher's settings for both."""
    capabilities = FamilyCapabilities(
        trainer_types=tuple(TRAINER_TYPES),
        options={"provider": ("huggingface",), "method": ("LoRA", "QLoRA", "Full"), "modality": ("text", "vision")},
        features={"gguf": True, "onnx": True},
    )
    path = folder / "environments/llm" / MANIFEST_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(EnvironmentManifest(environment="llm", python="3.11", families={"llm": capabilities}).model_dump_json())
    return {"TUNESMITH_LOCAL_VENVS": str(folder / "venvs"), "TUNESMITH_LOCAL_ENVIRONMENTS": str(folder / "environments")}
