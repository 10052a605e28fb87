"""The commands that control jobs: `pause`, `cancel`, `resume` and `retry`."""

import time
from collections.abc import Callable
from typing import Annotated

import typer

from cli.errors import CliError, Problem
from cli.http_client import Client, Json
from cli.job_names import find_job_id, shorten_job_id
from cli.job_secrets import SecretOption, send_with_secrets
from cli.options import (
    ContinueHardwareOption,
    EpochsOption,
    JobsArgument,
    JsonOption,
    MaxCostOption,
    MaxGpuSecondsOption,
    MaxStepsOption,
    ResentHfTokenOption,
    ResentWandbKeyOption,
    SecretsOption,
    create_client,
)
from cli.output import err, out, print_json
from cli.render.control import describe_next
from cli.render.formats import format_status
from cli.request import parse_hardware, parse_pairs, without_none

WAIT_POLL_S = 0.5


def pause(
    context: typer.Context,
    jobs: JobsArgument,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until the job is paused; exit with 1 if it ends instead.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Save a checkpoint and release the compute, so that the job can be resumed."""
    with create_client(context) as client:
        answers = _control_each(client, jobs, lambda job_id: client.post(f"/jobs/{job_id}/pause"), "pausing" if wait else None, as_json)
    if wait and any(answer["status"] != "paused" for answer in answers):
        raise typer.Exit(1)


def cancel(
    context: typer.Context,
    jobs: JobsArgument,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until the job is canceled; exit with 1 if it completes instead.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Stop jobs. Their checkpoints are kept."""
    with create_client(context) as client:
        answers = _control_each(client, jobs, lambda job_id: client.post(f"/jobs/{job_id}/cancel"), "cancelling" if wait else None, as_json)
    if wait and any(answer["status"] != "cancelled" for answer in answers):
        raise typer.Exit(1)


def resume(
    context: typer.Context,
    jobs: JobsArgument,
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
    """Continue paused jobs from their checkpoints."""
    changes = {
        "hardware": parse_hardware(hardware),
        "epochs": epochs,
        "max_steps": max_steps,
        "max_gpu_seconds": max_gpu_seconds,
        "max_cost_usd": max_cost_usd,
        "secrets": parse_pairs("--secret", secret),
    }
    secrets = [SecretOption.of(context, "hf_token", hf_token), SecretOption.of(context, "wandb_api_key", wandb_api_key)]
    _continue_each(context, jobs, "resume", changes, secrets, as_json)


def retry(
    context: typer.Context,
    jobs: JobsArgument,
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
    """Continue failed or canceled jobs from their last valid checkpoints."""
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
    _continue_each(context, jobs, "retry", changes, secrets, as_json)


def _continue_each(context: typer.Context, jobs: list[str], action: str, changes: Json, secrets: list[SecretOption], as_json: bool) -> None:
    with create_client(context) as client:

        def send(job_id: str) -> Json:
            return send_with_secrets(lambda body: client.post(f"/jobs/{job_id}/{action}", body), without_none(changes), secrets)

        _control_each(client, jobs, send, None, as_json)


def _control_each(client: Client, jobs: list[str], send: Callable[[str], Json], status_to_leave: str | None, as_json: bool) -> list[Json]:
    """Send a request about each job, wait until they have left a status, and print what they do now and next.

    A job that refuses does not keep the others from being controlled; its error is raised at the end.
    """
    answers: list[Json] = []
    errors: list[CliError] = []
    for job in jobs:
        try:
            answers.append(send(find_job_id(client, job)))
        except CliError as error:
            errors.append(error)
    if status_to_leave:
        answers = [_wait_while(client, answer, status_to_leave) for answer in answers]
    problems = [problem for error in errors for problem in error.problems]
    if as_json and len(jobs) > 1:
        print_json({"jobs": answers} | ({"errors": [_describe(problem) for problem in problems]} if problems else {}))
        if problems:
            raise typer.Exit(1)
    elif as_json and answers:
        print_json(answers[0])
    elif not as_json:
        for answer in answers:
            _print_status(answer, with_id=len(jobs) > 1)
    if errors:
        raise errors[0] if len(errors) == 1 else CliError.of(problems)
    return answers


def _wait_while(client: Client, job: Json, status: str) -> Json:
    """Poll until the job leaves this status, and return it."""
    while job["status"] == status:
        time.sleep(WAIT_POLL_S)
        job = client.get(f"/jobs/{job['job_id']}")
    return job


def _print_status(job: Json, *, with_id: bool) -> None:
    """Print the status as the result, and what happens next as a message about it."""
    prefix = f"{job['job_id']} " if with_id else ""
    out.print(prefix + format_status(job["status"]), highlight=False, soft_wrap=True)
    word = shorten_job_id(job["job_id"]) if err.is_terminal else job["job_id"]
    if text := describe_next(job, word):
        err.print(f"  {text}", style="dim", markup=False, highlight=False, soft_wrap=True)


def _describe(problem: Problem) -> Json:
    return {"message": problem.message, "hint": problem.hint, "param": problem.param}
