"""What `train` chooses where a request leaves it open, and how it says what applies."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from cli.errors import ApiError, CliError
from cli.http_client import Client, Json
from cli.job_names import find_job_id
from cli.settings import Settings

JOB_PREFIX = "job:"
LOCAL_OWNER = "local"  # of models that were imported from a folder
# The trainer type for rows that several types train, or that need more than rows.
USUAL_TRAINERS = {"messages": "sft", "prompt_completion": "sft", "text": "sft", "preference": "dpo", "unpaired_preference": "kto"}
NEEDS_GRADERS = "prompt"


@dataclass(frozen=True)
class TrainerChoice:
    """A trainer type that was chosen, and what to say about it."""

    name: str
    note: str = ""


def choose_trainer(dataset_type: str, training_config: Json, capabilities: Json) -> TrainerChoice:
    """The trainer type for rows of this type. Raises CliError if the choice is not obvious."""
    fitting = [name for name, trainer in capabilities["trainer_types"].items() if dataset_type in trainer["dataset_types"]]
    rows = f"rows of {dataset_type.replace('_', ' ')}"
    if dataset_type == NEEDS_GRADERS and "reward_config" not in training_config:
        hint = "write a request file with trainer_type grpo and reward_config (docs/api.md shows one), and add --dataset"
        raise CliError(f"{rows} have no answers to learn from: grpo trains on them with graders", hint, param="trainer_type")
    if not fitting:
        known = ", ".join(capabilities["trainer_types"])
        raise CliError(f"no trainer here trains {rows}", f"this deployment has {known}", param="trainer_type")
    usual = USUAL_TRAINERS.get(dataset_type, fitting[0] if len(fitting) == 1 else "")
    if usual not in fitting:
        raise CliError(f"{rows} fit several trainers", f"--trainer {' or '.join(fitting)}", param="trainer_type")
    others = [name for name in fitting if name != usual]
    return TrainerChoice(usual, f"trainer {usual}, for {rows}; --trainer {' or '.join(others)} would use them too" if others else "")


def choose_default_exports(training_config: Json, capabilities: Json) -> Json | None:
    """A GGUF file to chat with, where the deployment can write one and the model generates text."""
    is_text = training_config.get("modality", "text") == "text" and training_config.get("trainer_type") != "reward"
    if is_text and "q8_0" in capabilities["export"]["gguf_quantizations"]:
        return {"include_gguf": True, "gguf_quantization": "q8_0"}
    return None


def resolve_base(client: Client, base: str, settings: Settings) -> str:
    """The full name of a base: a short name of a stored model, the name of an earlier job after `job:`, or a name as it is.

    A folder of this machine is imported first, under its own name.
    A name that the service does not know stays as it is: submitting the job tells what is wrong with it, with everything else.
    """
    if base.startswith(JOB_PREFIX):
        return JOB_PREFIX + find_job_id(client, base.removeprefix(JOB_PREFIX))
    if base.startswith(("./", "../", "/", "~")) or base in (".", "..") or Path(base).is_dir():
        return _import_base(client, Path(base).expanduser().absolute(), settings)
    if "/" in base:
        return base
    try:
        return client.get(f"/models/{quote(base)}")["name"]
    except ApiError as error:
        if error.status in (400, 404, 422):
            return base
        raise


def _import_base(client: Client, folder: Path, settings: Settings) -> str:
    if not folder.is_dir():
        raise CliError(f"there is no folder {folder}", "`tunesmith models list` shows the models in the store", param="base_model_id")
    from cli.models import import_folder  # only this case needs it

    name = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name).strip("-._") or "model"
    return import_folder(settings, client, folder, f"{LOCAL_OWNER}/{name}")


def describe_choices(job: Json) -> Iterator[str]:
    """What a job trains and how, with the defaults that apply: a line per subject."""
    config: Json = job["training_config"]
    hyperparameters: Json = config["hyperparameters"]
    earlier: Json | None = job["earlier_model"]
    yield f"base      {job['base_model_id']}" + (f", continued from the {earlier['kind']} of {earlier['job_id']}" if earlier else "")
    rank = f", rank {hyperparameters['lora_rank']}" if job["method"] != "Full" else ""
    images = ", with images" if job["modality"] == "vision" else ""
    yield f"trainer   {job['trainer_type']}, {job['method']}{rank}{images}"
    yield f"hardware  {job['launcher']}/{job['hardware']}"
    length = f"{hyperparameters['max_steps']} steps" if hyperparameters["max_steps"] > 0 else f"{hyperparameters['epochs']} epochs"
    batch = f"batch {hyperparameters['batch_size']} × {hyperparameters['gradient_accumulation_steps']}"
    yield f"training  {length}, learning rate {hyperparameters['learning_rate']:g}, {batch}, {hyperparameters['max_seq_length']} tokens"
    yield f"exports   {_describe_exports(config['export_config'])}"
    trackers = [_describe_tracker(name, value) for name, value in config.items() if _is_tracker(name, value)]
    if trackers:
        yield f"trackers  {', '.join(trackers)}"


def _describe_exports(export: Json) -> str:
    gguf = [f"GGUF {name}" for name in _as_list(export["gguf_quantization"] or "q8_0")] if export["include_gguf"] else []
    hub = [f"to {export['hf_repo_id']} on the Hub"] if export["hf_repo_id"] else []
    return ", ".join([*_as_list(export["format"]), *gguf, *(["adapter as GGUF"] if export["include_lora_gguf"] else []), *hub])


def _as_list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _is_tracker(name: str, value: object) -> bool:
    return name in ("wandb_config", "mlflow_config", "tensorboard_config", "trackio_config") and value is not None


def _describe_tracker(name: str, config: Json) -> str:
    project = config.get("project") or config.get("experiment_name")
    mode = ", offline" if config.get("mode") == "offline" else ""
    return name.removesuffix("_config") + (f" ({project}{mode})" if project else "")
