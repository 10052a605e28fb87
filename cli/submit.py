"""The commands that create a job: `train`, `export` and `clone`."""

from pathlib import Path
from typing import Annotated

import typer

from cli.http_client import Client
from cli.job_names import find_job_id
from cli.job_secrets import SecretOption, send_with_secrets
from cli.options import (
    HfTokenOption,
    JobArgument,
    JsonOption,
    MaxCostOption,
    MaxGpuSecondsOption,
    ResentHfTokenOption,
    ResentWandbKeyOption,
    SecretsOption,
    WatchOption,
    create_client,
)
from cli.output import print_answer
from cli.request import apply_overrides, build_train_request, parse_hardware, parse_secrets, without_none
from cli.watch import watch_job


def train(
    context: typer.Context,
    file: Annotated[
        Path | None, typer.Argument(exists=True, dir_okay=False, help="A request or a training_config, as YAML or JSON.")
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="processed_dataset_id")] = None,
    base: Annotated[str | None, typer.Option(help="base_model_id, such as google/gemma-3-270m, or job:ID of an earlier job")] = None,
    name: Annotated[str | None, typer.Option(help="job_name")] = None,
    trainer: Annotated[str | None, typer.Option(help="trainer_type: sft, dpo, orpo, kto, grpo or reward. Default: sft.")] = None,
    method: Annotated[str | None, typer.Option(help="LoRA, QLoRA or Full")] = None,
    hardware: Annotated[
        str | None, typer.Option(help="Hardware profile, or several by comma in order of preference; `tunesmith capabilities` lists them.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other field of training_config, such as hyperparameters.max_steps=40; can be repeated."),
    ] = None,
    max_gpu_seconds: MaxGpuSecondsOption = None,
    max_cost_usd: MaxCostOption = None,
    hf_token: HfTokenOption = None,
    should_watch: WatchOption = False,
    as_json: JsonOption = False,
) -> None:
    """Submit a training job. Prints its id."""
    request = build_train_request(
        file,
        {
            "processed_dataset_id": dataset,
            "job_name": name,
            "hf_token": hf_token,
            "hardware": parse_hardware(hardware),
            "max_gpu_seconds": max_gpu_seconds,
            "max_cost_usd": max_cost_usd,
        },
        {"base_model_id": base, "method": method, "trainer_type": trainer},
        overrides,
    )
    with create_client(context) as client:
        _print_new_job(client, client.train(request), should_watch, as_json)


def export(
    context: typer.Context,
    job: JobArgument,
    step: Annotated[
        int | None,
        typer.Argument(
            min=0, help="Step of the checkpoint, as printed by `tunesmith checkpoints`. Default: the published one, else the newest."
        ),
    ] = None,
    formats: Annotated[
        list[str] | None, typer.Option("--format", help="adapter, merged or onnx; can be repeated. Default: adapter.")
    ] = None,
    gguf: Annotated[
        list[str] | None, typer.Option("--gguf", help="Also export a GGUF file with this quantization: q8_0, f16, …; can be repeated.")
    ] = None,
    lora_gguf: Annotated[bool, typer.Option("--lora-gguf", help="Also export the adapter as a GGUF file.")] = False,
    to_hub: Annotated[str | None, typer.Option("--to-hub", help="Also push to this Hub repository: owner/name.")] = None,
    attempt: Annotated[
        int | None, typer.Option(min=1, help="Attempt that saved the checkpoint, if several attempts saved this step.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="job_name")] = None,
    hardware: Annotated[str | None, typer.Option(help="Hardware profile. Default: the one that trained the job.")] = None,
    max_gpu_seconds: MaxGpuSecondsOption = None,
    max_cost_usd: MaxCostOption = None,
    hf_token: HfTokenOption = None,
    should_watch: WatchOption = False,
    as_json: JsonOption = False,
) -> None:
    """Export a checkpoint without training again. Prints the id of the job that exports it."""
    export_config = without_none(
        {
            "format": formats or None,
            "include_gguf": True if gguf else None,
            "gguf_quantization": gguf or None,
            "include_lora_gguf": lora_gguf or None,
            "destination": "hfhub" if to_hub else None,
            "hf_repo_id": to_hub,
        }
    )
    request = without_none(
        {
            "export_config": export_config or None,
            "attempt": attempt,
            "job_name": name,
            "hardware": parse_hardware(hardware),
            "max_gpu_seconds": max_gpu_seconds,
            "max_cost_usd": max_cost_usd,
            "hf_token": hf_token,
        }
    )
    with create_client(context) as client:
        _print_new_job(client, client.export(find_job_id(client, job), step, request), should_watch, as_json)


def clone(
    context: typer.Context,
    job: JobArgument,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="A field of training_config to change, such as hyperparameters.learning_rate=1e-4; null removes it."),
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="processed_dataset_id. Default: the same.")] = None,
    name: Annotated[str | None, typer.Option(help="job_name. Default: the same.")] = None,
    hardware: Annotated[str | None, typer.Option(help="Hardware profile. Default: the same.")] = None,
    max_gpu_seconds: MaxGpuSecondsOption = None,
    max_cost_usd: MaxCostOption = None,
    hf_token: ResentHfTokenOption = None,
    wandb_api_key: ResentWandbKeyOption = None,
    secret: SecretsOption = None,
    should_watch: WatchOption = False,
    as_json: JsonOption = False,
) -> None:
    """Submit the request of a job again, with changes. Prints the id of the new job."""
    training_config: dict[str, object] = {}
    apply_overrides(training_config, overrides)
    request = without_none(
        {
            "job_name": name,
            "processed_dataset_id": dataset,
            "hardware": parse_hardware(hardware),
            "max_gpu_seconds": max_gpu_seconds,
            "max_cost_usd": max_cost_usd,
            "training_config": training_config or None,
        }
    )
    request["secrets"] = parse_secrets(secret) or {}
    secrets = [
        SecretOption.of(context, "hf_token", hf_token),
        SecretOption.of(context, "wandb_api_key", wandb_api_key, field="secrets.wandb_api_key"),
    ]
    with create_client(context) as client:
        job_id = find_job_id(client, job)
        clone_id = send_with_secrets(lambda body: client.clone(job_id, body), request, secrets)
        _print_new_job(client, clone_id, should_watch, as_json)


def _print_new_job(client: Client, job_id: str, should_watch: bool, as_json: bool) -> None:
    print_answer({"job_id": job_id}, as_json, job_id)
    if should_watch:
        watch_job(client, job_id, as_json)
