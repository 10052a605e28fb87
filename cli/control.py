"""Commands that change what a job does: pause, resume, retry, cancel."""

import time
from typing import Annotated

import typer

from cli.http_client import Client, Json
from cli.job_secrets import SecretOption, send_with_secrets
from cli.options import (
    ContinueHardwareOption,
    EpochsOption,
    JobIdArgument,
    JsonOption,
    MaxStepsOption,
    ResentHfTokenOption,
    ResentWandbKeyOption,
    SecretsOption,
    create_client,
)
from cli.output import print_answer
from cli.render.formats import format_status
from cli.request import parse_secrets, without_none

WAIT_POLL_S = 0.5


def pause(
    context: typer.Context,
    job_id: JobIdArgument,
    wait: Annotated[bool, typer.Option("--wait", help="Until it is paused; exits 1 if it ends instead.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Save a checkpoint, free the compute, keep the place."""
    with create_client(context) as client:
        job = client.post(f"/jobs/{job_id}/pause")
        if wait:
            job = _wait_while(client, job, "pausing")
    print_answer(job, as_json, format_status(job["status"]))
    if wait and job["status"] != "paused":
        raise typer.Exit(1)


def cancel(
    context: typer.Context,
    job_id: JobIdArgument,
    wait: Annotated[bool, typer.Option("--wait", help="Until it has ended; exits 1 if it completed all the same.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Stop a job; what it saved stays."""
    with create_client(context) as client:
        job = client.post(f"/jobs/{job_id}/cancel")
        if wait:
            job = _wait_while(client, job, "cancelling")
    print_answer(job, as_json, format_status(job["status"]))
    if wait and job["status"] != "cancelled":
        raise typer.Exit(1)


def _wait_while(client: Client, job: Json, status: str) -> Json:
    """The job, once it no longer has that status."""
    while job["status"] == status:
        time.sleep(WAIT_POLL_S)
        job = client.get(f"/jobs/{job['job_id']}")
    return job


def resume(
    context: typer.Context,
    job_id: JobIdArgument,
    hardware: ContinueHardwareOption = None,
    epochs: EpochsOption = None,
    max_steps: MaxStepsOption = None,
    hf_token: ResentHfTokenOption = None,
    wandb_api_key: ResentWandbKeyOption = None,
    secret: SecretsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Go on where the pause was."""
    changes = {"hardware": hardware, "epochs": epochs, "max_steps": max_steps, "secrets": parse_secrets(secret)}
    secrets = [SecretOption.of(context, "hf_token", hf_token), SecretOption.of(context, "wandb_api_key", wandb_api_key)]
    _continue_job(context, f"/jobs/{job_id}/resume", changes, secrets, as_json)


def retry(
    context: typer.Context,
    job_id: JobIdArgument,
    from_start: Annotated[bool, typer.Option("--from-start", help="Begin again; earlier checkpoints no longer count.")] = False,
    hardware: ContinueHardwareOption = None,
    epochs: EpochsOption = None,
    max_steps: MaxStepsOption = None,
    hf_token: ResentHfTokenOption = None,
    wandb_api_key: ResentWandbKeyOption = None,
    secret: SecretsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Continue a failed or cancelled job from its last good checkpoint."""
    changes: Json = {"from_start": from_start or None, "hardware": hardware, "epochs": epochs, "max_steps": max_steps}
    changes["secrets"] = parse_secrets(secret)
    secrets = [SecretOption.of(context, "hf_token", hf_token), SecretOption.of(context, "wandb_api_key", wandb_api_key)]
    _continue_job(context, f"/jobs/{job_id}/retry", changes, secrets, as_json)


def _continue_job(context: typer.Context, path: str, changes: Json, secrets: list[SecretOption], as_json: bool) -> None:
    with create_client(context) as client:
        job = send_with_secrets(lambda body: client.post(path, body), without_none(changes), secrets)
    print_answer(job, as_json, format_status(job["status"]))
