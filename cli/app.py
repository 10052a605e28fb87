"""The commands of `tunesmith`."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import typer
import yaml
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.progress import DownloadColumn, Progress, TaskID, TransferSpeedColumn

from cli import render as show
from cli.http_client import ApiError, Client, Json
from service.__main__ import find_service_url
from service.__main__ import serve as run_service
from service.settings import SOURCE_ROOT, Settings

app = typer.Typer(help="One HTTP request becomes a fine-tuned model.", no_args_is_help=True, pretty_exceptions_enable=False)
datasets_app = typer.Typer(help="Upload, list and show datasets.", no_args_is_help=True)
app.add_typer(datasets_app, name="datasets")

# Into a pipe or a file a line is as long as it must be.
out = Console(width=None if sys.stdout.isatty() else 240)
err = Console(stderr=True)

ReturnT = TypeVar("ReturnT")

MAX_DELETE_TRIES, DELETE_RETRY_DELAY_S = 40, 0.5  # an attempt that does not listen is ended within ten seconds
WAIT_POLL_S = 0.5
PENDING_REASON_POLL_S = 15.0

JsonOption = Annotated[bool, typer.Option("--json", help="Print the API's JSON.")]
JobIdArgument = Annotated[str, typer.Argument(help="As `tunesmith train` or `tunesmith jobs` printed it.")]
HardwareOption = Annotated[str | None, typer.Option("--hardware", help="Go on with another profile; `tunesmith capabilities` lists them.")]
EpochsOption = Annotated[int | None, typer.Option("--epochs", min=1, help="In all; more than before.")]
MaxStepsOption = Annotated[
    int | None, typer.Option("--max-steps", min=1, help="In all; more than before, where the job is counted in steps.")
]
HfTokenOption = Annotated[
    str | None, typer.Option("--hf-token", envvar="HF_TOKEN", show_envvar=True, help="The variable is sent only where it is needed again.")
]
WandbKeyOption = Annotated[str | None, typer.Option("--wandb-api-key", envvar="WANDB_API_KEY", show_envvar=True, help="Likewise.")]


SecretsOption = Annotated[
    list[str] | None, typer.Option("--secret", help="Another one that the job had, such as mlflow_token=…; can be repeated.")
]


class GlobalOptions:
    """What the options before the command said."""

    url: str | None = None
    identity_token: str | None = None


@app.callback()
def set_global_options(
    url: Annotated[str | None, typer.Option(envvar="TUNESMITH_URL", help="The service; left out, the one in TUNESMITH_HOME.")] = None,
    identity_token: Annotated[
        str | None,
        typer.Option(
            envvar="TUNESMITH_IDENTITY_TOKEN",
            help="For a service on Cloud Run: what `gcloud auth print-identity-token` prints.",
        ),
    ] = None,
) -> None:
    """One HTTP request becomes a fine-tuned model."""
    GlobalOptions.url = url
    GlobalOptions.identity_token = identity_token


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="0 takes a free one.")] = None,
) -> None:
    """Start a service here; the first line printed is its url."""
    given = {name: value for name, value in (("host", host), ("port", port)) if value is not None}
    run_service(_load_settings().model_copy(update=given))


@datasets_app.command("upload")
def upload_dataset(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="JSONL; docs/api.md shows the forms of rows.")],
    name: Annotated[str | None, typer.Option(help="Left out: the file's name.")] = None,
    eval_fraction: Annotated[float, typer.Option(help="Share of the rows held out for evaluation.")] = 0.1,
    project: Annotated[str | None, typer.Option(help="The project that it belongs to.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Upload rows; every one is checked before any is kept."""
    fields = {"eval_fraction": str(eval_fraction)} | ({"name": name} if name else {}) | ({"project_id": project} if project else {})
    with _create_client() as client, file.open("rb") as stream:
        dataset = client.upload(stream, file.name, fields)
    _print(dataset, as_json, dataset["processed_dataset_id"])
    if not as_json:
        err.print(f"{dataset['rows']} rows of {dataset['dataset_type']}: {dataset['splits']}", style="dim")


@datasets_app.command("import")
def import_dataset(
    key: Annotated[str, typer.Argument(help="Of a file in the dataset store, such as incoming/rows.jsonl.")],
    name: Annotated[str | None, typer.Option(help="Left out: the file's name.")] = None,
    eval_fraction: Annotated[float, typer.Option(help="Share of the rows held out for evaluation.")] = 0.1,
    project: Annotated[str | None, typer.Option(help="The project that it belongs to.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a dataset of a file that lies in the store already: for those that are too large for an upload."""
    fields = {"incoming": key, "eval_fraction": str(eval_fraction)}
    fields |= ({"name": name} if name else {}) | ({"project_id": project} if project else {})
    with _create_client() as client:
        dataset = client.import_dataset(fields)
    _print(dataset, as_json, dataset["processed_dataset_id"])


@datasets_app.command("list")
def list_datasets(
    limit: Annotated[int, typer.Option(min=1, max=200)] = 50,
    cursor: Annotated[str | None, typer.Option(help="Continue behind a page.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Datasets, newest first."""
    with _create_client() as client:
        page = client.get("/datasets", limit=limit, cursor=cursor)
    _print(page, as_json, show.dataset_table(page["datasets"]))
    _print_next_cursor(page, as_json)


@datasets_app.command("show")
def show_dataset(dataset_id: Annotated[str, typer.Argument()], as_json: JsonOption = False) -> None:
    """A dataset and its first rows."""
    with _create_client() as client:
        dataset = client.get(f"/datasets/{dataset_id}")
    _print(dataset, as_json, show.dataset_table([dataset]))
    if not as_json:
        out.print_json(data=dataset["preview"])


@datasets_app.command("delete")
def delete_dataset(dataset_id: Annotated[str, typer.Argument()], as_json: JsonOption = False) -> None:
    """Remove a dataset that no unfinished job needs."""
    with _create_client() as client:
        deleted = client.delete(f"/datasets/{dataset_id}")
    _print(deleted, as_json, f"deleted {dataset_id}")


@app.command()
def train(
    file: Annotated[
        Path | None, typer.Argument(exists=True, dir_okay=False, help="The request, or its training_config, as YAML or JSON.")
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="processed_dataset_id")] = None,
    base: Annotated[str | None, typer.Option(help="base_model_id, such as google/gemma-3-270m")] = None,
    name: Annotated[str | None, typer.Option(help="job_name")] = None,
    trainer: Annotated[str | None, typer.Option(help="trainer_type: sft, dpo, orpo, kto, grpo or reward; left out, sft.")] = None,
    method: Annotated[str | None, typer.Option(help="LoRA, QLoRA or Full")] = None,
    hardware: Annotated[str | None, typer.Option(help="What to train on; `tunesmith capabilities` lists the profiles.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any other knob: hyperparameters.max_steps=40, export_config.include_gguf=true")
    ] = None,
    hf_token: Annotated[str | None, typer.Option(envvar="HF_TOKEN", help="For gated or private bases.", show_envvar=True)] = None,
    should_watch: Annotated[bool, typer.Option("--watch", help="Follow it until it ends.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Submit a job."""
    request = _build_request(
        file,
        {"processed_dataset_id": dataset, "job_name": name, "hf_token": hf_token, "hardware": hardware},
        {"base_model_id": base, "method": method, "trainer_type": trainer},
        set_,
    )
    with _create_client() as client:
        job_id = client.train(request)
        _print({"job_id": job_id}, as_json, job_id)
        if should_watch:
            _watch(client, job_id, as_json)


@app.command()
def jobs(
    status: Annotated[str | None, typer.Option(help="Only jobs with this status.")] = None,
    project: Annotated[str | None, typer.Option(help="Only jobs of this project.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=200)] = 50,
    cursor: Annotated[str | None, typer.Option(help="Continue behind a page.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Jobs, newest first."""
    with _create_client() as client:
        page = client.get("/jobs", status=status, project_id=project, limit=limit, cursor=cursor)
    _print(page, as_json, show.job_table(page["jobs"]))
    _print_next_cursor(page, as_json)


@app.command("show")
def show_job(job_id: JobIdArgument, as_json: JsonOption = False) -> None:
    """A job in full."""
    with _create_client() as client:
        job = client.get(f"/jobs/{job_id}")
    if as_json:
        out.print_json(data=job)
    else:
        show.print_job(out, job)


@app.command()
def watch(job_id: JobIdArgument, as_json: JsonOption = False) -> None:
    """Follow a job until it ends, also over pauses: progress, loss, time left. Exits 1 unless it completed."""
    with _create_client() as client:
        _watch(client, job_id, as_json)


@app.command()
def logs(
    job_id: JobIdArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until the job ends.")] = False,
    attempt: Annotated[int | None, typer.Option(min=1, help="Left out: the latest, or with -f each in turn.")] = None,
) -> None:
    """What an attempt printed."""
    with _create_client() as client:
        if follow:
            for text in client.follow_log(job_id, attempt):
                sys.stdout.write(text)
                sys.stdout.flush()
            return
        offset = 0
        while True:
            page = client.get(f"/jobs/{job_id}/logs", attempt=attempt, offset=offset)
            if not page["text"]:
                return
            sys.stdout.write(page["text"])
            offset = page["next_offset"]


@app.command()
def pause(
    job_id: JobIdArgument,
    wait: Annotated[bool, typer.Option("--wait", help="Until it is paused; exits 1 if it ends instead.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Save a checkpoint, free the compute, keep the place."""
    with _create_client() as client:
        job = client.post(f"/jobs/{job_id}/pause")
        if wait:
            job = _wait_for_status_change(client, job, "pausing")
    _print(job, as_json, show.format_status(job["status"]))
    if wait and job["status"] != "paused":
        raise typer.Exit(1)


@app.command()
def resume(
    context: typer.Context,
    job_id: JobIdArgument,
    hardware: HardwareOption = None,
    epochs: EpochsOption = None,
    max_steps: MaxStepsOption = None,
    hf_token: HfTokenOption = None,
    wandb_api_key: WandbKeyOption = None,
    secret: SecretsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Go on where the pause was."""
    changes = {"hardware": hardware, "epochs": epochs, "max_steps": max_steps, "secrets": _parse_pairs("--secret", secret)}
    job = _continue_job(context, f"/jobs/{job_id}/resume", changes, {"hf_token": hf_token, "wandb_api_key": wandb_api_key})
    _print(job, as_json, show.format_status(job["status"]))


@app.command()
def retry(
    context: typer.Context,
    job_id: JobIdArgument,
    from_start: Annotated[bool, typer.Option("--from-start", help="Begin again; earlier checkpoints no longer count.")] = False,
    hardware: HardwareOption = None,
    epochs: EpochsOption = None,
    max_steps: MaxStepsOption = None,
    hf_token: HfTokenOption = None,
    wandb_api_key: WandbKeyOption = None,
    secret: SecretsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Continue a failed or cancelled job from its last good checkpoint."""
    changes: Json = {"from_start": from_start or None, "hardware": hardware, "epochs": epochs, "max_steps": max_steps}
    changes["secrets"] = _parse_pairs("--secret", secret)
    job = _continue_job(context, f"/jobs/{job_id}/retry", changes, {"hf_token": hf_token, "wandb_api_key": wandb_api_key})
    _print(job, as_json, show.format_status(job["status"]))


@app.command()
def cancel(
    job_id: JobIdArgument,
    wait: Annotated[bool, typer.Option("--wait", help="Until it has ended; exits 1 if it completed all the same.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Stop a job; what it saved stays."""
    with _create_client() as client:
        job = client.post(f"/jobs/{job_id}/cancel")
        if wait:
            job = _wait_for_status_change(client, job, "cancelling")
    _print(job, as_json, show.format_status(job["status"]))
    if wait and job["status"] != "cancelled":
        raise typer.Exit(1)


@app.command()
def checkpoints(job_id: JobIdArgument, as_json: JsonOption = False) -> None:
    """Where a job can go on, or be exported; the one that counts comes first."""
    with _create_client() as client:
        found = client.get(f"/jobs/{job_id}/checkpoints")
    _print(found, as_json, show.checkpoint_table(found["checkpoints"]))
    if not found["checkpoints"] and not as_json:
        err.print("none yet", style="dim")


@app.command()
def export(
    job_id: JobIdArgument,
    step: Annotated[
        int | None, typer.Argument(min=0, help="As `tunesmith checkpoints` printed it; left out, what was published, else the newest.")
    ] = None,
    formats: Annotated[
        list[str] | None, typer.Option("--format", help="adapter, merged or onnx; can be repeated; left out, adapter.")
    ] = None,
    gguf: Annotated[list[str] | None, typer.Option("--gguf", help="Also a GGUF file: q8_0, f16, …; can be repeated.")] = None,
    lora_gguf: Annotated[bool, typer.Option("--lora-gguf", help="Also the adapter alone as GGUF.")] = False,
    to_hub: Annotated[str | None, typer.Option("--to-hub", help="Also push to this Hub repository, owner/name.")] = None,
    attempt: Annotated[int | None, typer.Option(min=1, help="Whose checkpoint, where several attempts have one of that step.")] = None,
    name: Annotated[str | None, typer.Option(help="job_name")] = None,
    hardware: Annotated[str | None, typer.Option(help="What to export on; left out, what the job trained on.")] = None,
    hf_token: Annotated[str | None, typer.Option(envvar="HF_TOKEN", help="For gated or private bases.", show_envvar=True)] = None,
    should_watch: Annotated[bool, typer.Option("--watch", help="Follow it until it ends.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Export a checkpoint without training again; prints the job that does it, to be watched and downloaded from."""
    config = _without_none(
        {
            "format": formats or None,
            "include_gguf": True if gguf else None,
            "gguf_quantization": gguf or None,
            "include_lora_gguf": lora_gguf or None,
            "destination": "hfhub" if to_hub else None,
            "hf_repo_id": to_hub,
        }
    )
    request = _without_none(
        {"export_config": config or None, "attempt": attempt, "job_name": name, "hardware": hardware, "hf_token": hf_token}
    )
    with _create_client() as client:
        export_id = client.export(job_id, step, request)
        _print({"job_id": export_id}, as_json, export_id)
        if should_watch:
            _watch(client, export_id, as_json)


@app.command()
def clone(
    context: typer.Context,
    job_id: JobIdArgument,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="What is to be different: hyperparameters.learning_rate=1e-4; null removes.")
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="processed_dataset_id; left out, the same.")] = None,
    name: Annotated[str | None, typer.Option(help="job_name; left out, the same.")] = None,
    hardware: Annotated[str | None, typer.Option(help="What to train on; left out, the same.")] = None,
    hf_token: HfTokenOption = None,
    wandb_api_key: WandbKeyOption = None,
    secret: SecretsOption = None,
    should_watch: Annotated[bool, typer.Option("--watch", help="Follow it until it ends.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Run a job's request once more, with changes."""
    changes: Json = {}
    for knob in set_ or []:
        _apply_override(changes, knob)
    body = _without_none({"job_name": name, "processed_dataset_id": dataset, "hardware": hardware, "training_config": changes or None})
    body["secrets"] = _parse_pairs("--secret", secret) or {}
    secrets = {"hf_token": hf_token, "secrets.wandb_api_key": wandb_api_key}
    typed = {
        "hf_token": _is_from_command_line(context, "hf_token"),
        "secrets.wandb_api_key": _is_from_command_line(context, "wandb_api_key"),
    }
    with _create_client() as client:
        clone_id = _send_with_secrets(lambda: client.clone(job_id, body), body, secrets, typed)
        _print({"job_id": clone_id}, as_json, clone_id)
        if should_watch:
            _watch(client, clone_id, as_json)


@app.command()
def delete(
    job_id: JobIdArgument,
    delete_hub: Annotated[bool, typer.Option("--hub", help="Also the Hub repository that holds nothing but what the job pushed.")] = False,
    hf_token: Annotated[str | None, typer.Option(envvar="HF_TOKEN", help="With --hub.", show_envvar=True)] = None,
    as_json: JsonOption = False,
) -> None:
    """Stop a job and remove it with all its files."""
    if delete_hub and not hf_token:
        raise ApiError("--hub needs a token that may delete the repository", "--hf-token, or HF_TOKEN")
    token = hf_token if delete_hub else None
    with _create_client() as client:
        answer = client.delete(f"/jobs/{job_id}", hub_token=token)
        for _ in range(MAX_DELETE_TRIES):
            if answer["deleted"]:
                break
            time.sleep(DELETE_RETRY_DELAY_S)  # it is being stopped
            answer = client.delete(f"/jobs/{job_id}", hub_token=token)
    _print(answer, as_json, answer["message"])


@app.command()
def orphans(
    should_delete: Annotated[bool, typer.Option("--delete", help="Remove them. Look at the list first.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Files that belong to no job."""
    with _create_client() as client:
        found = client.post("/internal/cleanup", {"orphans": True}) if should_delete else client.get("/internal/orphans")
    _print(found, as_json, show.orphan_table(found["orphans"]))
    if as_json:
        return
    total = show.format_size(sum(orphan["size_bytes"] for orphan in found["orphans"]))
    err.print(f"{'deleted' if should_delete else 'found'} {total}" if found["orphans"] else "there are none", style="dim")
    if not found["complete"]:
        err.print("not everything could be looked at in the time there was; repeat the command", style="dim")


@app.command()
def download(
    job_id: JobIdArgument,
    artifact: Annotated[str | None, typer.Option(help="adapter, merged, gguf-q8_0, …; left out: GGUF, else merged, else adapter.")] = None,
    to: Annotated[Path, typer.Option("--to", help="The folder to write into.")] = Path(),
    as_json: JsonOption = False,
) -> None:
    """Fetch what a job made, and check every digest."""
    with _create_client() as client:
        written = _download(client, job_id, artifact, to)
    if as_json:
        out.print_json(data={"files": [str(path) for path in written]})
    else:
        for path in written:
            print(path)  # a path must not be wrapped


@app.command()
def chat(
    job_id: JobIdArgument,
    artifact: Annotated[str | None, typer.Option(help="Which GGUF; left out, the first.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="One question; left out, a conversation.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0)] = 0.7,
) -> None:
    """Talk to the result, on this machine."""
    settings = _load_settings()
    with _create_client() as client:
        job = client.get(f"/jobs/{job_id}")
        ggufs = [made["name"] for made in job["artifacts"] if made["kind"] == "gguf"]
        if not ggufs:
            hint = f"tunesmith export {job_id} --gguf q8_0" if job["status"] == "completed" else f"the job is {job['status']}"
            raise ApiError(f"{job_id} has no GGUF file to talk to", hint)
        folder = settings.home_folder / "downloads" / job_id
        [gguf] = _download(client, job_id, artifact or ggufs[0], folder, skip_existing=True)
    command = [
        settings.trainer_python,
        "-m",
        "jobs.llm.chat",
        "--gguf",
        gguf,
        "--max-tokens",
        str(max_tokens),
        "--temperature",
        str(temperature),
    ]
    raise typer.Exit(subprocess.run([*command, *(["--prompt", prompt] if prompt else [])], cwd=SOURCE_ROOT, check=False).returncode)


@app.command()
def capabilities(as_json: JsonOption = False) -> None:
    """What this deployment can train, on what, and into what."""
    with _create_client() as client:
        found = client.get("/capabilities")
    if as_json:
        out.print_json(data=found)
        return
    out.print(f"launcher    {found['launcher']} on {found['hardware']['device_name']} ({found['hardware']['device']})", highlight=False)
    for name, facts in found["profiles"].items():
        out.print(f"hardware    {name}: {facts['device_name']}", highlight=False)
    for name, kind in found["trainer_types"].items():
        out.print(f"trainer     {name}: {', '.join(kind['dataset_types'])}; {', '.join(kind['modalities'])}", highlight=False)
    for label in ("methods", "providers", "graders", "trackers"):
        out.print(f"{label:11} {', '.join(found[label])}", highlight=False)
    exports = found["export"]
    out.print(f"exports     {', '.join(exports['formats'])}; GGUF {', '.join(exports['gguf_quantizations']) or 'no'}", highlight=False)
    out.print(f"to          {', '.join(exports['destinations'])}", highlight=False)


def main() -> None:
    """The entry point: errors are one line and a hint, never a stack trace."""
    try:
        app()
    except ApiError as error:
        err.print(f"[red]error[/] {escape(error.message)}", highlight=False)
        if error.hint:
            err.print(f"  try: {escape(error.hint)}", style="dim", highlight=False)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


# --- helpers ---------------------------------------------------------------------------------------------------------


def _load_settings() -> Settings:
    try:
        return Settings()  # pyright: ignore[reportCallIssue]  # pydantic fills them from the environment
    except ValidationError as error:
        first = error.errors()[0]
        where = f"{first['loc'][0]}: " if first["loc"] else ""
        what = first["msg"].removeprefix("Value error, ")
        raise ApiError(f"the settings do not work: {where}{what}", "docs/settings.md lists them") from error


def _create_client() -> Client:
    settings = _load_settings()
    return Client(GlobalOptions.url or find_service_url(settings.home_folder) or settings.url, GlobalOptions.identity_token)


# Any: what rich can render, and what the API answered.
def _print(answer: Json, as_json: bool, readable: Any) -> None:  # noqa: ANN401
    if as_json:
        print(json.dumps(answer))  # for programs: never wrapped or coloured
    else:
        out.print(readable)


def _print_next_cursor(page: Json, as_json: bool) -> None:
    if page["next_cursor"] and not as_json:
        err.print(f"more: --cursor {page['next_cursor']}", style="dim", soft_wrap=True)


def _without_none(fields: Json) -> Json:
    """The fields that were given."""
    return {name: value for name, value in fields.items() if value is not None}


def _wait_for_status_change(client: Client, job: Json, status: str) -> Json:
    """The job, once it has that status no more."""
    while job["status"] == status:
        time.sleep(WAIT_POLL_S)
        job = client.get(f"/jobs/{job['job_id']}")
    return job


def _continue_job(context: typer.Context, address: str, changes: Json, secrets: dict[str, str | None]) -> Json:
    """Make a job go on. Secrets that were typed are sent; those of the environment only once the service says that it needs them."""
    body = _without_none(changes)
    typed = {name: _is_from_command_line(context, name) for name in secrets}
    with _create_client() as client:
        return _send_with_secrets(lambda: client.post(address, body), body, secrets, typed)


def _send_with_secrets(
    send: Callable[[], ReturnT], body: Json, secrets: dict[str, str | None], from_command_line: dict[str, bool]
) -> ReturnT:
    """Send the body, with the secrets that were typed, and again with each that the service says it needs."""
    for place, value in secrets.items():
        if value and from_command_line[place]:
            _set_secret(body, place, value)
    asked: set[str] = {place for place, was_typed in from_command_line.items() if was_typed}
    while True:
        try:
            return send()
        except ApiError as error:
            needed = error.param or ""
            if needed.startswith("secrets.") and needed not in secrets:
                hint = f"--secret {needed.removeprefix('secrets.')}=…; {error.hint}"
                raise ApiError(error.message, hint, error.code, error.status, needed) from error
            if needed not in secrets or needed in asked:
                raise
            if not secrets[needed]:
                option = needed.removeprefix("secrets.").replace("_", "-")
                raise ApiError(error.message, f"--{option}; {error.hint}", error.code, error.status, needed) from error
            asked.add(needed)
            _set_secret(body, needed, secrets[needed])


def _set_secret(body: Json, path: str, value: str | None) -> None:
    """`secrets.wandb_api_key` stands in the body's `secrets`, anything without a dot in the body."""
    group, dot, name = path.partition(".")
    if dot:
        body.setdefault(group, {})[name] = value
    else:
        body[path] = value


def _is_from_command_line(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _build_request(file: Path | None, top: Json, config: Json, overrides: list[str] | None) -> Json:
    """The request from a file, with what the flags say on top."""
    request: Json = {}
    if file:
        request = _load_request_file(file)
        if "training_config" not in request:
            request = {"training_config": request}
    request |= _without_none(top)
    training: Json = request.setdefault("training_config", {})
    training |= _without_none(config)
    for knob in overrides or []:
        _apply_override(training, knob)
    return request


def _load_request_file(file: Path) -> Json:
    try:
        content: object = yaml.safe_load(file.read_text())  # JSON is YAML, too
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ApiError(f"{file} is neither YAML nor JSON: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise ApiError(f"{file} holds no object", "see docs/api.md for a request")
    return cast(Json, content)


def _parse_pairs(option: str, texts: list[str] | None) -> Json | None:
    return dict(_parse_pair(option, text) for text in texts) if texts else None


def _parse_pair(option: str, text: str) -> tuple[str, str]:
    """`name=value`."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ApiError(f"{option} {name} has no value", f"write it like {option} {name}=VALUE")
    return name, value


def _apply_override(training: Json, override: str) -> None:
    """`hyperparameters.max_steps=40`: the value is read as YAML, so numbers and lists are what they look like."""
    path, text = _parse_pair("--set", override)
    *folders, name = path.split(".")
    place = training
    for folder in folders:
        inner: object = place.setdefault(folder, {})
        if not isinstance(inner, dict):
            raise ApiError(f"--set {override}: {folder} holds no fields")
        place = cast(Json, inner)
    value = yaml.safe_load(text)
    if isinstance(value, str):  # YAML takes 1e-4 for text
        with suppress(ValueError):
            value = float(value)
    place[name] = value


def _watch(client: Client, job_id: str, as_json: bool) -> None:
    if as_json:
        for event in client.stream_events(job_id):
            print(json.dumps(event), flush=True)
    else:
        with show.progress_bar(out) as bar, _print_pending_reason(client, job_id, lambda line: bar.console.print(line, highlight=False)):
            task = bar.add_task("", total=1, phase="queued", loss="–", eta="")
            for event in client.stream_events(job_id):
                _update_progress(bar, task, event["event"])
                if line := show.event_line(event):
                    bar.console.print(line, highlight=False)
                if event["event"].get("status") == "paused" and client.get(f"/jobs/{job_id}")["status"] == "paused":
                    bar.console.print(f"[dim]waiting for `tunesmith resume {job_id}`; Ctrl-C ends the watching alone[/]", soft_wrap=True)
    job = client.get(f"/jobs/{job_id}")
    if not as_json:
        show.print_job(out, job)
    if job["status"] != "completed":
        raise typer.Exit(1)


def _update_progress(bar: Progress, task: TaskID, body: Json) -> None:
    match body["type"]:
        case "status":
            bar.update(task, phase=body["status"], eta="")
        case "phase":
            bar.update(task, phase=body["phase"])
        case "checkpoint_restored":
            bar.update(task, completed=body["step"])
        case "metrics" if body["progress"]:
            _update_step(bar, task, body)
        case _:
            pass


@contextmanager
def _print_pending_reason(client: Client, job_id: str, print_line: Callable[[str], None]) -> Generator[None]:
    """Inside, a job that cannot be launched says why, each time the reason changes. The record has it, no event does."""
    over = threading.Event()

    def look() -> None:
        told: str | None = None
        while not over.wait(PENDING_REASON_POLL_S):
            with suppress(ApiError):
                why = show.get_pending_reason(client.get(f"/jobs/{job_id}"))
                if why and why != told:
                    print_line(f"[yellow]waiting[/] {escape(why)}")
                told = why

    teller = threading.Thread(target=look, name="delays", daemon=True)
    teller.start()
    try:
        yield
    finally:
        over.set()
        teller.join()


def _update_step(bar: Progress, task: TaskID, point: Json) -> None:
    place, loss = point["progress"], point["values"].get("loss")
    bar.update(task, completed=place["step"], total=place["total_steps"])
    bar.update(task, eta=show.format_time_left(place["eta_s"]))
    if loss is not None:
        bar.update(task, loss=f"{loss:.3f}")


def _download(client: Client, job_id: str, artifact: str | None, to: Path, *, skip_existing: bool = False) -> list[Path]:
    """Fetch an artifact's files; with `keep`, not those that are there already with the right size."""
    answer = client.get(f"/jobs/download/{job_id}", artifact=artifact)
    written: list[Path] = []
    with Progress(*Progress.get_default_columns(), DownloadColumn(), TransferSpeedColumn(), console=err, transient=True) as bar:
        for file in answer["files"]:
            target = to / answer["artifact"] / file["path"] if answer["is_folder"] else to / file["path"]
            written.append(target)
            if skip_existing and target.exists() and target.stat().st_size == file["size_bytes"]:
                continue
            task = bar.add_task(target.name, total=file["size_bytes"])
            client.download_file(file, target, lambda count, task=task: bar.advance(task, count))
    return written
