"""The command `chat`: finds a model of a job or a base, brings it to this machine, and starts the chat as a process."""

import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated
from urllib.parse import quote

import typer

from cli.artifacts import FOLDER_KINDS, Choice, choose_talker, is_part
from cli.completion import complete_jobs
from cli.errors import ApiError, CliError
from cli.http_client import Client, Json
from cli.job_names import find_job_id, shorten_job_id
from cli.options import create_client
from cli.output import err
from cli.settings import SOURCE_ROOT, Settings
from cli.transfer import Downloader
from schema.models import MODELS_PREFIX

TEMPLATE_FILES = ("chat_template.jinja", "tokenizer_config.json")
NOT_FOUND = 404


@dataclass(frozen=True)
class Session:
    """What the process talks to: a file, a folder, or the URL of a model's folder in a store."""

    model: str
    title: str
    base: str | None = None  # of an adapter, or to compare with
    template_of: Path | None = None  # whose chat template a base without one is asked with


def chat(
    context: typer.Context,
    target: Annotated[
        str,
        typer.Argument(
            metavar="JOB|MODEL",
            autocompletion=complete_jobs,
            help="A job, as elsewhere, or a base model of the service's store, such as google/gemma-3-270m.",
        ),
    ],
    artifact: Annotated[
        str | None,
        typer.Option(help="Artifact of the job. Default: the first GGUF model that kept the training, else merged, else adapter."),
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="Chat with the base that the job trained, asked in the same way.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="The base and the trained model both answer each question.")] = False,
    system: Annotated[str | None, typer.Option(help="Tell the model how to answer.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Ask one question. Default: an interactive chat.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of an answer in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0, help="Sampling temperature; 0 is deterministic.")] = 0.7,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help='Read lines like {"prompt": "…"}, with "reset": true for a new conversation, and write every token as JSON.'
        ),
    ] = False,
) -> None:
    """Chat with a model of a job, or with a base model, on this machine."""
    _check_options(base=base, compare=compare, texts={"--system": system, "--prompt": prompt})
    settings = Settings.from_environment()
    with create_client(context) as client:
        finder = _Finder(client, settings)
        session = finder.find(target, artifact, base=base, compare=compare)
    command = ["--model", session.model, f"--title={session.title}"]
    command += ["--base", session.base] if session.base is not None else []
    command += ["--compare"] if compare else []
    command += ["--template-of", str(session.template_of)] if session.template_of is not None else []
    command += ["--downloads", str(settings.home_folder / "downloads/models"), "--history", str(settings.home_folder / "chat_history")]
    command += ["--max-tokens", str(max_tokens), "--temperature", str(temperature)]
    command += [f"--system={system}"] if system is not None else []
    command += [f"--prompt={prompt}"] if prompt is not None else []
    command += ["--json"] if as_json else []
    raise typer.Exit(_run_chat(settings, command))


def _check_options(*, base: bool, compare: bool, texts: dict[str, str | None]) -> None:
    for option, text in texts.items():
        if text is not None and not text.strip():
            raise CliError(f"{option} is empty", f"write a text, or leave {option} out", exit_code=2)
    if base and compare:
        raise CliError("--compare asks the base and the trained model, and --base only the base", "use one of the two", exit_code=2)


class _Finder:
    """Finds what to talk to, and downloads it."""

    def __init__(self, client: Client, settings: Settings) -> None:
        self._client = client
        self._settings = settings

    def find(self, target: str, artifact: str | None, *, base: bool, compare: bool) -> Session:
        """What the words of the command mean. Raises CliError."""
        job = self._find_job(target)
        if job is None:
            if artifact is not None or base or compare:
                raise CliError(f"{target} is a base model: --artifact, --base and --compare are for a job", "leave them out", exit_code=2)
            name, location = self._locate_base(target)
            return Session(location, name)
        if base:
            return self._find_base_of(job, artifact)
        choice = choose_talker(job, artifact)
        for note in choice.notes:
            err.print(note, markup=False, highlight=False, soft_wrap=True)
        name, path = choice.artifact["name"], self._download(job, choice)
        title = f"{name} of {job['job_name']} {shorten_job_id(job['job_id'])}"
        if not compare and choice.artifact["kind"] != "adapter":
            return Session(str(path), title)
        base_name, location = self._locate_base(job["base_model_id"])
        if compare:
            _note_original_base(job)
        return Session(str(path), f"{base_name} and {title}" if compare else title, base=location)

    def _find_job(self, target: str) -> Json | None:
        """The job that a word means, or None if it is the name of a model. Raises CliError for neither."""
        if "/" in target:
            return None
        try:
            return self._client.get(f"/jobs/{find_job_id(self._client, target)}")
        except CliError as error:
            if error.exit_code == 2 or (isinstance(error, ApiError) and error.status != NOT_FOUND):
                raise
            if not self._is_model(target):
                hint = "; ".join(filter(None, [error.hint, "`tunesmith models list` lists base models"]))
                raise CliError(f"there is no job and no base model {target!r}", hint) from error
            return None

    def _is_model(self, name: str) -> bool:
        try:
            self._client.get(f"/models/{quote(name)}")
        except ApiError as error:
            if error.code == "unreachable":
                raise
            return False
        return True

    def _find_base_of(self, job: Json, artifact: str | None) -> Session:
        name, location = self._locate_base(job["base_model_id"])
        _note_original_base(job)
        return Session(location, f"{name}, the base of {job['job_name']}", template_of=self._find_template(job, artifact))

    def _find_template(self, job: Json, artifact: str | None) -> Path | None:
        """A trained model of the job for its chat template: the template's files of a folder are enough; None if it has no model."""
        named = [each for each in job["artifacts"] if artifact in (None, each["name"])]
        if artifact is not None and not named:
            choose_talker(job, artifact)  # raises
        folder = next((each for each in named if each["kind"] in FOLDER_KINDS), None)
        if folder is not None:
            downloader = self._downloader(job)
            return downloader.download(job["job_id"], folder["name"], trust_sizes=True, overwrite=True, only=TEMPLATE_FILES).folder
        gguf = next((each for each in named if each["kind"] == "gguf" and not is_part(each["name"])), None)
        return self._download(job, Choice(gguf)) if gguf is not None else None

    def _download(self, job: Json, choice: Choice) -> Path:
        """The path of the model in <home>/downloads: a GGUF file, or a folder."""
        name = choice.artifact["name"]
        local = self._downloader(job).download(job["job_id"], name, trust_sizes=True, overwrite=True)
        return (local.find(".gguf") if choice.artifact["kind"] == "gguf" else None) or local.folder

    def _downloader(self, job: Json) -> Downloader:
        return Downloader(self._client, self._settings.home_folder / "downloads" / job["job_id"])

    def _locate_base(self, name: str) -> tuple[str, str]:
        """The full name of a base model, and the URL of its folder in the store. Raises CliError for one that is not there."""
        row = self._client.get(f"/models/{quote(name)}")
        if not row["available"]:
            raise CliError(f"the base {row['name']} is not in the model store", f"tunesmith models pull {row['name']}")
        store_url: str = self._client.get("/models")["store_url"]
        return row["name"], f"{store_url.rstrip('/')}/{MODELS_PREFIX}{row['name']}"


def _note_original_base(job: Json) -> None:
    """Say that the base is not what the training started from, where an earlier job's model is."""
    earlier = job.get("earlier_model")
    if earlier:
        note = f"{job['base_model_id']} is the original base; the job started from the model of {earlier['job_id']}"
        err.print(note, markup=False, highlight=False, soft_wrap=True)


def _run_chat(settings: Settings, arguments: Sequence[str]) -> int:
    """Run the chat and return its exit code. Ctrl-C is for the chat: this process waits for its end."""
    command = [str(settings.trainer_python), "-m", "jobs.llm.chat", *arguments]
    before = signal.signal(signal.SIGINT, _leave_to_chat)
    try:
        code = subprocess.run(command, cwd=SOURCE_ROOT, check=False).returncode
    except OSError as error:
        problem = f"the trainer's environment cannot be started: {settings.trainer_python}: {error.strerror}"
        raise CliError(problem, "install it with `make setup`, or set TUNESMITH_LOCAL_VENVS to the folder of the environments") from error
    finally:
        signal.signal(signal.SIGINT, before)
    return code if code >= 0 else 128 - code


def _leave_to_chat(_: int, __: FrameType | None) -> None:
    """The terminal sends Ctrl-C to both processes."""
