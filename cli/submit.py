"""The commands that create a job from an earlier one: `export` and `clone`."""

from typing import Annotated

import typer

from cli.export_options import (
    FormatOption,
    GgufOption,
    HfPrivateOption,
    ImatrixOption,
    LoraGgufOption,
    MergedDtypeOption,
    ToHubOption,
    build_export_config,
)
from cli.http_client import Client
from cli.job_names import find_job_id
from cli.job_secrets import SecretOption, send_with_secrets
from cli.options import (
    HfTokenOption,
    JobArgument,
    JsonOption,
    MaxCostOption,
    MaxGpuSecondsOption,
    MetadataOption,
    ResentHfTokenOption,
    ResentWandbKeyOption,
    SecretsOption,
    WatchOption,
    create_client,
)
from cli.output import print_answer
from cli.request import apply_overrides, parse_hardware, parse_pairs, without_none
from cli.watch import watch_job


def export(
    context: typer.Context,
    job: JobArgument,
    step: Annotated[
        int | None,
        typer.Argument(
            min=0, help="Step of the checkpoint, as printed by `tunesmith checkpoints`. Default: the published one, else the newest."
        ),
    ] = None,
    formats: FormatOption = None,
    gguf: GgufOption = None,
    merged_dtype: MergedDtypeOption = None,
    imatrix: ImatrixOption = None,
    lora_gguf: LoraGgufOption = False,
    to_hub: ToHubOption = None,
    hf_private: HfPrivateOption = None,
    attempt: Annotated[
        int | None, typer.Option(min=1, help="Attempt that saved the checkpoint, if several attempts saved this step.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the new job.")] = None,
    metadata: MetadataOption = None,
    hardware: Annotated[str | None, typer.Option(help="Hardware profile. Default: the one that trained the job.")] = None,
    max_gpu_seconds: MaxGpuSecondsOption = None,
    max_cost_usd: MaxCostOption = None,
    hf_token: HfTokenOption = None,
    should_watch: WatchOption = False,
    as_json: JsonOption = False,
) -> None:
    """Export a checkpoint without training again. Prints the id of the job that exports it."""
    export_config = build_export_config(
        formats=formats,
        gguf=gguf,
        merged_dtype=merged_dtype,
        imatrix=imatrix,
        lora_gguf=lora_gguf,
        to_hub=to_hub,
        hf_private=hf_private,
    )
    request = without_none(
        {
            "export_config": export_config,
            "attempt": attempt,
            "job_name": name,
            "metadata": parse_pairs("--metadata", metadata),
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
        typer.Option(
            "--set",
            help="A field of the request or of its training_config to change, such as hyperparameters.learning_rate=1e-4; null removes it.",
        ),
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="Id of a dataset. Default: the same.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the new job. Default: the same.")] = None,
    metadata: MetadataOption = None,
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
    request = without_none(
        {
            "job_name": name,
            "metadata": parse_pairs("--metadata", metadata),
            "processed_dataset_id": dataset,
            "hardware": parse_hardware(hardware),
            "max_gpu_seconds": max_gpu_seconds,
            "max_cost_usd": max_cost_usd,
        }
    )
    apply_overrides(request, overrides)
    request.setdefault("secrets", {}).update(parse_pairs("--secret", secret) or {})
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
