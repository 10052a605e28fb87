"""The command `train`: from a file of rows, a dataset or a request to a job that is watched until it ends."""

import json
import sys
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, cast

import typer
from rich.markup import escape

from cli.background import ensure_service
from cli.choices import JOB_PREFIX, choose_default_exports, choose_trainer, describe_choices, resolve_base
from cli.completion import complete_bases, complete_hardware, complete_methods, complete_trainers
from cli.errors import ApiError, CliError
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
from cli.hints import OPTIONS
from cli.http_client import Client, Json
from cli.job_secrets import SecretOption
from cli.options import EvalFractionOption, HfTokenOption, JsonOption, MaxCostOption, MaxGpuSecondsOption, MetadataOption, create_client
from cli.output import err, out, print_answer, print_json
from cli.render.plan import describe_estimate, render_plan
from cli.request import build_train_request, parse_hardware, parse_pairs
from cli.row_options import (
    DelimiterOption,
    DropInvalidOption,
    EncodingOption,
    FileFormatOption,
    MapOption,
    MappingOption,
    RowOptions,
    SheetOption,
    SourceCredentialsOption,
    TextUnitOption,
    build_reading,
    build_secrets,
)
from cli.rows import RowsFile, find_rows, find_uploaded, is_source, remember_upload
from cli.settings import Settings
from cli.upload import import_source, print_dataset, upload_rows
from cli.watch import watch_job

REQUEST_SUFFIXES = (".yaml", ".yml")
MAX_REQUEST_BYTES = 2_000_000  # a chat template is the longest field
REQUEST_FIELDS = {"training_config", "base_model_id", "trainer_type", "hyperparameters", "export_config", "processed_dataset_id"}
DATASET_PREFIX = "dataset_"
AUTO = "auto"  # the service chooses


def train(
    context: typer.Context,
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="[ROWS|REQUEST|DATASET]",
            help="Rows: JSON Lines, JSON, CSV, TSV, Parquet, Arrow, XLSX or text, also as .gz, .zst, .zip or a folder, or hf://, gs://, "
            "s3://, https://. Or a request or a training_config (.yaml, .json), or the id of a dataset.",
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            autocompletion=complete_bases,
            help="Model to start from: its name, such as gemma-3-270m, a folder such as ./my-model, or job:ID for the model of a job.",
        ),
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="Id of a dataset, with a request file that names none.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the job. Default: the name of the file of rows.")] = None,
    trainer: Annotated[
        str | None,
        typer.Option(autocompletion=complete_trainers, help="sft, dpo, orpo, kto, grpo or reward. Default: what the rows are for."),
    ] = None,
    method: Annotated[str | None, typer.Option(autocompletion=complete_methods, help="LoRA, QLoRA or Full. Default: LoRA.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the rows. Default: 3 for sft and orpo, else 1.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps, instead of epochs.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--lr", help="Peak learning rate, such as 1e-4. Default: by trainer and method.")
    ] = None,
    batch_size: Annotated[str | None, typer.Option(help="Sequences per device and forward pass, or auto.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the LoRA adapter. Default: 16.")] = None,
    max_length: Annotated[str | None, typer.Option(help="Tokens per row, or auto; longer rows are truncated. Default: 1024.")] = None,
    hardware: Annotated[
        str | None,
        typer.Option(
            autocompletion=complete_hardware,
            help="Hardware profile, or several by comma in order of preference, or auto; `tunesmith capabilities` lists them.",
        ),
    ] = None,
    eval_fraction: EvalFractionOption = 0.1,
    mapping: MappingOption = None,
    pairs: MapOption = None,
    file_format: FileFormatOption = None,
    encoding: EncodingOption = None,
    delimiter: DelimiterOption = None,
    sheet: SheetOption = None,
    text_unit: TextUnitOption = None,
    drop_invalid: DropInvalidOption = False,
    source_credentials: SourceCredentialsOption = None,
    project: Annotated[str | None, typer.Option(help="Project of the job, and of rows that are uploaded.")] = None,
    metadata: MetadataOption = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Any other field of the request, such as project_id=x, or of its training_config, such as "
            "hyperparameters.warmup_ratio=0.1; can be repeated.",
        ),
    ] = None,
    formats: FormatOption = None,
    gguf: GgufOption = None,
    merged_dtype: MergedDtypeOption = None,
    imatrix: ImatrixOption = None,
    lora_gguf: LoraGgufOption = False,
    to_hub: ToHubOption = None,
    hf_private: HfPrivateOption = None,
    wandb_project: Annotated[str | None, typer.Option(help="Also report to this project of Weights & Biases.")] = None,
    wandb_api_key: Annotated[
        str | None,
        typer.Option(envvar="WANDB_API_KEY", show_envvar=True, help="W&B API key. The environment variable is used if W&B is asked for."),
    ] = None,
    max_gpu_seconds: MaxGpuSecondsOption = None,
    max_cost_usd: MaxCostOption = None,
    hf_token: HfTokenOption = None,
    should_watch: Annotated[
        bool | None,
        typer.Option(
            "--watch/--detach",
            " /--no-watch",
            help="Follow the job until it ends, or only print its id. Default: follow a job on rows, and any job on a terminal.",
        ),
    ] = None,
    is_dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Only say what the job would do, need, take and cost. Rows are uploaded, nothing else is kept."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train a model: upload rows, submit the job and follow it. Starts a service on this machine if none runs."""
    settings = Settings.from_environment()
    given = _read_source(source)
    request = build_train_request(
        given.request,
        {
            "processed_dataset_id": dataset or given.dataset_id,
            "job_name": name,
            "project_id": project,
            "metadata": parse_pairs("--metadata", metadata),
            "hf_token": hf_token,
            "hardware": parse_hardware(hardware),
            "max_gpu_seconds": max_gpu_seconds,
            "max_cost_usd": max_cost_usd,
        },
        {
            "base_model_id": base,
            "method": method,
            "trainer_type": trainer,
            "hyperparameters": {
                "epochs": epochs,
                "max_steps": max_steps,
                "learning_rate": learning_rate,
                "batch_size": _parse_count("batch_size", batch_size),
                "lora_rank": rank,
                "max_seq_length": _parse_count("max_seq_length", max_length),
            },
            "export_config": build_export_config(
                formats=formats,
                gguf=gguf,
                merged_dtype=merged_dtype,
                imatrix=imatrix,
                lora_gguf=lora_gguf,
                to_hub=to_hub,
                hf_private=hf_private,
            ),
            "wandb_config": {"project": wandb_project},
        },
        overrides,
    )
    if given.has_rows and (dataset or "processed_dataset_id" in request or "datasets" in request):
        raise CliError("the rows come from both a file and a dataset", "leave out the file, or --dataset", param=source)
    reading = build_reading(
        mapping=mapping,
        pairs=pairs,
        file_format=file_format,
        encoding=encoding,
        delimiter=delimiter,
        sheet=sheet,
        text_unit=text_unit,
        drop_invalid=drop_invalid,
    )
    if reading and not given.has_rows:
        raise CliError("options say how to read a file of rows, and there is none", "name the file, or leave them out", param=source)
    secrets = build_secrets(given.elsewhere or "", hf_token, source_credentials)
    options = RowOptions(None, eval_fraction, request.get("project_id"), reading, secrets)
    _add_wandb_key(request["training_config"], SecretOption.of(context, "wandb_api_key", wandb_api_key))
    follows = (given.has_rows or sys.stdout.isatty()) and not as_json if should_watch is None else should_watch
    ensure_service(context, settings)
    with create_client(context) as client:
        _resolve_base(client, request["training_config"], settings)
        if given.has_rows:
            request.setdefault("job_name", given.rows.label if given.rows else source)
            found = _get_dataset(client, given, options, request, settings, is_quiet=as_json)
            request["processed_dataset_id"] = found["processed_dataset_id"]
            _complete_request(client, request, found)
        elif given.dataset_id:
            _complete_request(client, request, client.get(f"/datasets/{given.dataset_id}"))
        if is_dry_run:
            _count_tokens(client, request)
            _print_plan(client.plan(request), as_json)
            return
        job_id = _submit(client, request, shows_estimate=follows and not as_json)
        print_answer({"job_id": job_id}, as_json, job_id)
        if follows and not as_json:
            for line in describe_choices(client.get(f"/jobs/{job_id}")):
                err.print(line, style="dim", highlight=False, soft_wrap=True)
        if follows:
            watch_job(client, job_id, as_json)


@dataclass(frozen=True)
class Source:
    """What the argument of `train` names: at most one of these."""

    rows: RowsFile | None = None
    elsewhere: str | None = None  # rows that the service reads itself
    request: Path | None = None
    dataset_id: str | None = None

    @property
    def has_rows(self) -> bool:
        """Whether a dataset must be made first."""
        return self.rows is not None or self.elsewhere is not None


def _read_source(source: str | None) -> Source:
    """What the argument names. Raises CliError if that is nothing, or wrong at first sight."""
    if source is None:
        return Source()
    if is_source(source):
        return Source(elsewhere=source)
    path = Path(source)
    if not path.exists():
        if source.startswith(DATASET_PREFIX):
            return Source(dataset_id=source)
        near = get_close_matches(path.name, [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else [])
        raise CliError("does not exist", f"did you mean {path.with_name(near[0])}?" if near else "", param=source)
    if path.suffix.lower() in REQUEST_SUFFIXES or (path.suffix.lower() == ".json" and _is_request(path)):
        return Source(request=path)
    return Source(rows=find_rows(path))


def _is_request(path: Path) -> bool:
    """Whether a JSON file is one object with fields of a request, and not rows."""
    if path.stat().st_size > MAX_REQUEST_BYTES:
        return False
    try:
        content: object = json.loads(path.read_bytes())
    except ValueError:  # also of bytes that are no text
        return False
    return isinstance(content, dict) and bool(REQUEST_FIELDS & cast(Json, content).keys())


def _parse_count(field: str, text: str | None) -> int | str | None:
    """A number, or `auto`."""
    if text is None or text == AUTO:
        return text
    try:
        return int(text)
    except ValueError:
        raise CliError(
            f"{text!r} is not a whole number", f"give a number, or {AUTO}", param=f"training_config.hyperparameters.{field}"
        ) from None


def _count_tokens(client: Client, request: Json) -> None:
    """Let the service count the tokens of the rows, which makes a plan exact. Without its base in the store they stay an estimate."""
    base: object = request["training_config"].get("base_model_id")
    if isinstance(base, str) and not base.startswith(JOB_PREFIX) and "processed_dataset_id" in request:
        with suppress(ApiError):
            client.post(f"/datasets/{request['processed_dataset_id']}/token_lengths", {"base_model_id": base})


def _add_wandb_key(training_config: Json, key: SecretOption) -> None:
    """Add the key if W&B is asked for: by options, or by a request that has no key of its own."""
    config: Json | None = training_config.get("wandb_config")
    is_asked_for = isinstance(config, dict) and config.get("mode") != "offline"
    if key.value and (key.is_typed or is_asked_for):
        training_config["wandb_config"] = {"api_key": key.value, **(config or {})}


def _resolve_base(client: Client, training_config: Json, settings: Settings) -> None:
    base: object = training_config.get("base_model_id")
    if isinstance(base, str):
        training_config["base_model_id"] = resolve_base(client, base, settings)
    elif base is None:
        models: list[Json] = client.get("/models")["models"]
        names = ", ".join(model["name"] for model in models)
        hint = (
            f"name the model to start from: --base NAME; here are {names}"
            if names
            else "`tunesmith models pull` gets one, then --base NAME"
        )
        raise CliError("is missing", hint, param="base_model_id")


def _get_dataset(client: Client, given: Source, options: RowOptions, request: Json, settings: Settings, *, is_quiet: bool) -> Json:
    """The dataset of the rows: found again, or made after the service has checked what it can of the request."""
    if given.rows is None:
        _check_request(client, request)
        label, note = given.elsewhere or "", ""
        dataset = import_source(client, label, options, is_quiet=is_quiet)
    elif (dataset := find_uploaded(client, given.rows, options, settings)) is not None:
        label, note = given.rows.name, f" (uploaded before, as {dataset['processed_dataset_id']})"
    else:
        _check_request(client, request)
        label, note = given.rows.name, ""
        dataset = upload_rows(client, given.rows, options, is_quiet=is_quiet)
        remember_upload(client, given.rows, options, settings, dataset["processed_dataset_id"])
    if not is_quiet:
        print_dataset(label, dataset, note)
    return dataset


def _check_request(client: Client, request: Json) -> None:
    """Let the service say what is wrong with the request before rows are sent for it: without a dataset, it refuses every request.

    Where the rows decide about the trainer, fields that only some trainers have are not looked at.
    """
    training_config: Json = request["training_config"]
    is_known = "trainer_type" in training_config
    try:
        client.plan({**request, "training_config": {"trainer_type": "sft", **training_config}})
    except ApiError as error:
        others = [
            problem for problem in error.problems if problem.param != "processed_dataset_id" and (is_known or problem.param in OPTIONS)
        ]
        if others:
            first, *more = others
            raise ApiError(first.message, first.hint, error.code, error.status, first.param, more) from error


def _submit(client: Client, request: Json, *, shows_estimate: bool) -> str:
    """Submit the job and return its id. For a person, a dry run says first how long it takes and what it costs."""
    if shows_estimate:
        plan = client.plan(request)
        if "job_id" in plan:  # a service from before dry runs has submitted the job
            return plan["job_id"]
        if line := describe_estimate(plan):
            err.print(line, style="dim", highlight=False, soft_wrap=True)
        for warning in plan["warnings"]:
            err.print(f"[yellow]warning[/] {escape(warning['message'])}", highlight=False, soft_wrap=True)
    return client.train(request)


def _print_plan(plan: Json, as_json: bool) -> None:
    if "job_id" in plan:
        hint = f"`tunesmith cancel {plan['job_id']}` stops it"
        raise CliError(f"the service is of a version without dry runs, and has started {plan['job_id']}", hint)
    if as_json:
        print_json(plan)
        return
    for part in render_plan(plan):
        out.print(part, highlight=False, soft_wrap=True)


def _complete_request(client: Client, request: Json, dataset: Json) -> None:
    """Choose what the request leaves open, by the rows and by what the deployment offers."""
    training_config: Json = request["training_config"]
    capabilities = client.get("/capabilities")
    if "trainer_type" not in training_config:
        trainer = choose_trainer(dataset["dataset_type"], training_config, capabilities)
        training_config["trainer_type"] = trainer.name
        if trainer.note:
            err.print(trainer.note, style="dim", highlight=False, soft_wrap=True)
    if dataset["images"] and "modality" not in training_config:
        training_config["modality"] = "vision"
    if "export_config" not in training_config and (exports := choose_default_exports(training_config, capabilities)):
        training_config["export_config"] = exports
