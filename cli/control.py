"""The commands that control a job: `pause`, `cancel`, `resume` and `retry`."""

import time
from typing import Annotated

import typer

from cli.http_client import Client, Json
from cli.job_names import find_job_id
from cli.job_secrets import SecretOption, send_with_secrets
from cli.options import (
    ContinueHardwareOption,
    EpochsOption,
    JobArgument,
    JsonOption,
    MaxCostOption,
    MaxGpuSecondsOption,
    MaxStepsOption,
    ResentHfTokenOption,
    ResentWandbKeyOption,
    SecretsOption,
    create_client,
)
from cli.output import print_answer
from cli.render.formats import format_status
from cli.request import parse_hardware, parse_pairs, without_none

WAIT_POLL_S = 0.5


def pause(
    context: typer.Context,
    job: JobArgument,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until the job is paused; exit with 1 if it ends instead.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Save a checkpoint and release the compute, so that the job can be resumed."""
    with create_client(context) as client:
        answer = client.post(f"/jobs/{find_job_id(client, job)}/pause")
        if wait:
            answer = _wait_while(client, answer, "pausing")
    print_answer(answer, as_json, format_status(answer["status"]))
    if wait and answer["status"] != "paused":
        raise typer.Exit(1)


def cancel(
    context: typer.Context,
    job: JobArgument,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until the job is canceled; exit with 1 if it completes instead.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Stop a job. Its checkpoints are kept."""
    with create_client(context) as client:
        answer = client.post(f"/jobs/{find_job_id(client, job)}/cancel")
        if wait:
            answer = _wait_while(client, answer, "cancelling")
    print_answer(answer, as_json, format_status(answer["status"]))
    if wait and answer["status"] != "cancelled":
        raise typer.Exit(1)


def _wait_while(client: Client, job: Json, status: str) -> Json:
    """Poll until the job leaves this status, and return it."""
    while job["status"] == status:
        time.sleep(WAIT_POLL_S)
        job = client.get(f"/jobs/{job['job_id']}")
    return job


def resume(
    context: typer.Context,
    job: JobArgument,
    hardware: ContinueHardwareOption = None,
    epochs: EpochsOption = None,
    max_steps: MaxStepsOption = None,
    max_gpu_seconds: MaxGpuSecondsOption = None,
    max_cost_usd: MaxCostOption = None,
    hf_token: ResentHfTokenOption = None,
    wandb_api_key: ResentWandbKeyOption = None,
    secret: SecretsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Continue a paused job from its checkpoint."""
    changes = {
        "hardware": parse_hardware(hardware),
        "epochs": epochs,
        "max_steps": max_steps,
        "max_gpu_seconds": max_gpu_seconds,
        "max_cost_usd": max_cost_usd,
        "secrets": parse_pairs("--secret", secret),
    }
    secrets = [SecretOption.of(context, "hf_token", hf_token), SecretOption.of(context, "wandb_api_key", wandb_api_key)]
    _continue_job(context, job, "resume", changes, secrets, as_json)


def retry(
    context: typer.Context,
    job: JobArgument,
    from_start: Annotated[bool, typer.Option("--from-start", help="Start over and ignore earlier checkpoints.")] = False,
    hardware: ContinueHardwareOption = None,
    epochs: EpochsOption = None,
    max_steps: MaxStepsOption = None,
    max_gpu_seconds: MaxGpuSecondsOption = None,
    max_cost_usd: MaxCostOption = None,
    hf_token: ResentHfTokenOption = None,
    wandb_api_key: ResentWandbKeyOption = None,
    secret: SecretsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Continue a failed or canceled job from its last valid checkpoint."""
    changes = {
        "from_start": from_start or None,
        "hardware": parse_hardware(hardware),
        "epochs": epochs,
        "max_steps": max_steps,
        "max_gpu_seconds": max_gpu_seconds,
        "max_cost_usd": max_cost_usd,
        "secrets": parse_pairs("--secret", secret),
    }
    secrets = [SecretOption.of(context, "hf_token", hf_token), SecretOption.of(context, "wandb_api_key", wandb_api_key)]
    _continue_job(context, job, "retry", changes, secrets, as_json)


def _continue_job(context: typer.Context, job: str, action: str, changes: Json, secrets: list[SecretOption], as_json: bool) -> None:
    with create_client(context) as client:
        path = f"/jobs/{find_job_id(client, job)}/{action}"
        answer = send_with_secrets(lambda body: client.post(path, body), without_none(changes), secrets)
    print_answer(answer, as_json, format_status(answer["status"]))
