"""The Google Cloud SDK, used for checks that need neither a network nor an account."""

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

LOADER_SCRIPT = """
import sys
root, path = sys.argv[1:]
sys.path[:0] = [f"{root}/lib", f"{root}/lib/third_party"]
from googlecloudsdk.api_lib.cloudbuild import cloudbuild_util, config
try:
    build = config.LoadCloudbuildConfigFromPath(path, cloudbuild_util.GetMessagesModule())
except Exception as error:
    sys.exit(f"{type(error).__name__}: {error}")
print(len(build.steps))
"""


@dataclass(frozen=True)
class Gcloud:
    """The SDK, with a configuration folder of its own."""

    config: Path

    def run(self, *words: str | Path, cwd: Path | None = None) -> str:
        """Run a command and return its output."""
        done = subprocess.run(["gcloud", *words], env=self._environment, cwd=cwd, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def load_build(self, path: Path) -> str:
        """Load a build config as `gcloud builds submit` does; the number of steps, or the error."""
        done = subprocess.run(
            [self._python, "-c", LOADER_SCRIPT, self._root, path], env=self._environment, capture_output=True, text=True, check=False
        )
        return (done.stdout or done.stderr).strip()

    def files_for_upload(self, folder: Path) -> list[str]:
        """The files that `gcloud builds submit` would upload."""
        return self.run("meta", "list-files-for-upload", folder).splitlines()

    def lint(self, commands: Sequence[str]) -> dict[str, str | None]:
        """The error of each command, or None. One call for all, because a call takes a second and a command only milliseconds."""
        numbered = {str(number): command for number, command in enumerate(dict.fromkeys(commands), start=1)}
        file = self.config / "commands.json"
        file.write_text(json.dumps([{"command_string": command, "id": number} for number, command in numbered.items()]))
        answers = json.loads(self.run("meta", "lint-gcloud-commands", "--serialize", f"--commands-file={file}"))
        return {command: _lint_error(answers[number]) for number, command in numbered.items()}

    @cached_property
    def command_groups(self) -> set[str]:
        """The first words of its commands, such as run and storage; without terraform, which is a program of its own here."""
        surface = self._root / "lib/surface"
        return {path.stem.replace("_", "-") for path in surface.iterdir() if path.stem[0] != "_"} - {"terraform"}

    @cached_property
    def _root(self) -> Path:
        return Path(self.run("info", "--format=value(installation.sdk_root)").strip())

    @cached_property
    def _python(self) -> str:
        bundled = self._root / "platform/bundledpythonunix/bin/python3"
        return os.environ.get("CLOUDSDK_PYTHON") or (str(bundled) if bundled.exists() else "python3")

    @cached_property
    def _environment(self) -> dict[str, str]:
        assert shutil.which("gcloud"), "these tests need the Google Cloud SDK: https://cloud.google.com/sdk/docs/install"
        quiet = {"CLOUDSDK_CORE_DISABLE_PROMPTS": "1", "CLOUDSDK_CORE_DISABLE_USAGE_REPORTING": "1"}
        return dict(os.environ) | quiet | {"CLOUDSDK_CONFIG": str(self.config), "CLOUDSDK_COMPONENT_MANAGER_DISABLE_UPDATE_CHECK": "1"}


def _lint_error(answers: Sequence[dict[str, str | None]]) -> str | None:
    errors = [answer["error_message"] or "not valid" for answer in answers if not answer["success"]]
    return "; ".join(errors) or None
