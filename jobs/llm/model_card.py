"""Writes the model card, the README.md of a repository on the Hub, from the run record. Unknown values are left out."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.llm.exporters.model_files import LICENSE_FILES
from schema.job import EvalMetrics, GateCheck
from schema.provenance import ArtifactRecord, BaseModelRecord, RunRecord

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

TEMPLATE = Path(__file__).with_suffix(".jinja")
GEMMA_TERMS = "https://ai.google.dev/gemma/terms"
PIPELINE_TAGS = {"text": "text-generation", "vision": "image-text-to-text"}
METRIC_NAMES = {
    "eval_loss": "loss (nats per token)",
    "perplexity": "perplexity",
    "content_perplexity": "perplexity without end-of-turn tokens",
    "accuracy": "token accuracy",
}
KIND_DESCRIPTIONS = {
    "adapter": "LoRA adapter, loaded on top of the base model",
    "merged": "full model",
    "gguf": "full model for llama.cpp and Ollama",
    "lora_gguf": "LoRA adapter for llama.cpp, loaded with the base model's GGUF file",
    "onnx": "full model for ONNX Runtime",
}
# The hyperparameters in the card; run.json has all of them.
REPORTED_HYPERPARAMETERS = (
    "learning_rate",
    "lr_scheduler_type",
    "epochs",
    "max_steps",
    "batch_size",
    "gradient_accumulation_steps",
    "max_seq_length",
    "packing",
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "use_dora",
    "use_rslora",
    "beta",
    "seed",
)


@dataclass(frozen=True)
class License:
    """The license of the base model, which applies to the tuned model. `hub_id` is None where it is unknown."""

    hub_id: str | None = None
    name: str | None = None  # of a license without an identifier on the Hub
    link: str | None = None
    files: tuple[str, ...] = ()  # the base model's license files


@dataclass(frozen=True)
class MetricRow:
    """A row of the metrics table."""

    name: str
    base: float | None
    tuned: float | None


@dataclass(frozen=True)
class UsageSnippet:
    """One way to run a file."""

    title: str
    language: str
    text: str


def model_card(record: RunRecord, repo_id: str, base_license: License) -> str:
    """The README.md of the repository: metadata for the Hub, and text."""
    from huggingface_hub import ModelCard
    from jinja2 import Environment, StrictUndefined

    jinja = Environment(undefined=StrictUndefined, trim_blocks=False, lstrip_blocks=False, autoescape=False)  # noqa: S701  # Markdown
    jinja.filters |= {"number": _format_number, "percent": _format_percent, "bounds": _format_bounds}
    has_merged_model = any(artifact.kind == "merged" for artifact in record.artifacts)
    text = jinja.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        card_data=card_data(record, repo_id, base_license).to_yaml(),
        title=repo_id.rpartition("/")[2],
        summary=_summary(record),
        record=record,
        files=list(_file_rows(record, has_merged_model)),
        usage_snippets=list(usage_snippets(record, repo_id)),
        metrics=list(compare_metrics(record.base_metrics, record.metrics)),
        evaluation_note=_evaluation_note(record.metrics),
        fidelity=[
            {"path": _repo_path(artifact, has_merged_model), "fidelity": artifact.fidelity}
            for artifact in record.artifacts
            if artifact.fidelity
        ],
        training=[{"name": name, "value": _format_cell(value)} for name, value in _training_rows(record)],
        license_text=_license_text(_base_model(record).model_id, base_license),
    )
    return str(ModelCard(text))  # parse it as the Hub does: invalid metadata raises here


def card_data(record: RunRecord, repo_id: str, base_license: License) -> "ModelCardData":
    """The card's metadata in the Hub's format."""
    from huggingface_hub import ModelCardData

    config, kinds = record.training_config, {artifact.kind for artifact in record.artifacts}
    trainer, modality = str(config["trainer_type"]), str(config["modality"])
    pipeline_tag = "text-classification" if trainer == "reward" else PIPELINE_TAGS[modality]
    return ModelCardData(
        base_model=_base_model(record).model_id,
        base_model_relation="finetune" if kinds & {"merged", "gguf", "onnx"} else "adapter",
        library_name="transformers" if "merged" in kinds else "peft" if "adapter" in kinds else "gguf",
        pipeline_tag=pipeline_tag,
        tags=["tunesmith", trainer, str(config["method"]).lower(), *(["gguf"] if kinds & {"gguf", "lora_gguf"} else [])],
        license=base_license.hub_id,
        license_name=base_license.name,
        license_link=base_license.link,
        model_name=repo_id.rpartition("/")[2],
        eval_results=list(_eval_results(record, pipeline_tag)) or None,
    )


def read_license(base_folder: Path) -> License:
    """The base model's license, from its model card's metadata or its model type."""
    from huggingface_hub import ModelCard

    files = tuple(sorted(path.name for path in base_folder.iterdir() if path.name.upper().startswith(LICENSE_FILES)))
    card = base_folder / "README.md"
    if card.is_file():
        metadata = ModelCard.load(card, ignore_metadata_errors=True).data
        if metadata.get("license"):
            return License(str(metadata.get("license")), metadata.get("license_name"), metadata.get("license_link"), files)
    model_type = json.loads((base_folder / "config.json").read_text(encoding="utf-8")).get("model_type", "")
    if str(model_type).startswith("gemma") or any(name.upper().startswith("GEMMA_TERMS") for name in files):
        return License("gemma", files=files)
    return License(files=files)


def compare_metrics(base: EvalMetrics | None, tuned: EvalMetrics | None) -> Iterator[MetricRow]:
    """Each metric of the base and the tuned model; a metric that neither has is left out."""
    base_values, tuned_values = _metric_values(base), _metric_values(tuned)
    for name in dict.fromkeys([*tuned_values, *base_values]):
        yield MetricRow(METRIC_NAMES.get(name, name), base_values.get(name), tuned_values.get(name))


def usage_snippets(record: RunRecord, repo_id: str) -> Iterator[UsageSnippet]:
    """How to run each kind of artifact in the record."""
    kinds = {artifact.kind for artifact in record.artifacts}
    if "merged" in kinds:
        yield UsageSnippet("With transformers", "python", _transformers(record, repo_id))
    if "adapter" in kinds:
        yield UsageSnippet("With peft (the adapter)", "python", _peft(record, repo_id, has_merged_model="merged" in kinds))
    for artifact in record.artifacts:
        file = _repo_path(artifact, has_merged_model=False)
        if artifact.kind == "gguf":
            commands = f'llama-cli -hf {repo_id} -hff {file} -p "Your question"\nollama run hf.co/{repo_id}:{file}'
            yield UsageSnippet(f"`{file}` with llama.cpp or Ollama", "sh", commands)
        elif artifact.kind == "lora_gguf":
            command = f"hf download {repo_id} {file} --local-dir .\nllama-cli -m base.gguf --lora {file}"
            yield UsageSnippet(f"`{file}` with llama.cpp and the base model's GGUF file", "sh", command)


def _transformers(record: RunRecord, repo_id: str) -> str:
    config = record.training_config
    if config["trainer_type"] == "reward":
        return (
            "from transformers import AutoModelForSequenceClassification, AutoTokenizer\n\n"
            f'tokenizer = AutoTokenizer.from_pretrained("{repo_id}")\n'
            f'model = AutoModelForSequenceClassification.from_pretrained("{repo_id}")\n'
            'print(model(**tokenizer("A question and its answer", return_tensors="pt")).logits)'
        )
    task = PIPELINE_TAGS[str(config["modality"])]
    setup = f'from transformers import pipeline\n\nmodel = pipeline("{task}", model="{repo_id}")\n'
    if config["modality"] == "vision":
        parts = '[{"type": "image", "url": "https://…"}, {"type": "text", "text": "Your question"}]'
        return setup + f'print(model(text=[{{"role": "user", "content": {parts}}}], max_new_tokens=128))'
    if record.dataset.dataset_type == "text":
        return setup + 'print(model("The beginning of a text", max_new_tokens=128))'
    return setup + 'print(model([{"role": "user", "content": "Your question"}], max_new_tokens=128))'


def _peft(record: RunRecord, repo_id: str, *, has_merged_model: bool) -> str:
    config = record.training_config
    auto_class = "AutoModelForImageTextToText" if config["modality"] == "vision" else "AutoModelForCausalLM"
    options = ""
    if config["trainer_type"] == "reward":
        auto_class, options = "AutoModelForSequenceClassification", ", num_labels=1"
    subfolder = ', subfolder="adapter"' if has_merged_model else ""
    return (
        f"from peft import PeftModel\nfrom transformers import {auto_class}\n\n"
        f'base = {auto_class}.from_pretrained("{_base_model(record).model_id}"{options})\n'
        f'model = PeftModel.from_pretrained(base, "{repo_id}"{subfolder})'
    )


def _base_model(record: RunRecord) -> BaseModelRecord:
    assert record.base_model is not None  # every language model is trained from one
    return record.base_model


def _summary(record: RunRecord) -> str:
    config, base_model = record.training_config, _base_model(record)
    tool = f"Tunesmith {record.code.tunesmith_version}" if record.code.tunesmith_version else "Tunesmith"
    base = f"[{base_model.model_id}](https://huggingface.co/{base_model.model_id})"
    revision = f" (revision `{base_model.revision}`)" if base_model.revision else ""
    return f"{base}{revision}, tuned by {tool} with {str(config['trainer_type']).upper()} and method {config['method']}."


def _training_rows(record: RunRecord) -> Iterator[tuple[str, object]]:
    """The rows of the training table; unknown and unused values are left out."""
    config, machine = record.training_config, record.machine
    hyperparameters = config["hyperparameters"]
    assert isinstance(hyperparameters, dict)
    if record.earlier_model:
        yield "started from", f"the model of job {record.earlier_model.job_id} ({record.earlier_model.trainer_type})"
    for dataset in record.mixed_datasets or (record.dataset,):
        weight = f", weight {dataset.weight:g}" if dataset.weight is not None else ""
        yield "dataset", f"{dataset.name} ({dataset.dataset_type}{weight})"
        yield "dataset digest", f"`{dataset.digest}`" if dataset.digest else "unknown"
        yield "rows", ", ".join(f"{split.rows} {name}" for name, split in dataset.splits.items())
    yield from ((name, config[name]) for name in ("trainer_type", "method", "modality", "provider"))
    for name in REPORTED_HYPERPARAMETERS:
        is_unused = config["method"] == "Full" and name.startswith(("lora_", "use_"))
        if hyperparameters.get(name) is not None and not is_unused:
            yield name, hyperparameters[name]
    run_values = {
        "optimizer steps": record.published_step,
        "tokens seen": record.train_tokens,
        "training time": None if record.time.train_runtime_s is None else f"{record.time.train_runtime_s:.0f} s",
        "hardware": ", ".join(machine.gpus) or f"{machine.cpu}, {machine.cpu_count} cores, no GPU",
        "GPU energy": None if record.cost.gpu_energy_wh is None else f"{record.cost.gpu_energy_wh:.1f} Wh",
        "libraries": ", ".join(
            f"{name} {record.packages[name]}" for name in ("torch", "transformers", "trl", "peft") if name in record.packages
        ),
        "job": f"{record.job_id}, attempt {record.attempt}",
        "finished": f"{record.time.finished_at:%Y-%m-%d}",
    }
    yield from ((name, value) for name, value in run_values.items() if value not in (None, ""))


def _file_rows(record: RunRecord, has_merged_model: bool) -> Iterator[dict[str, str]]:
    for artifact in record.artifacts:
        yield {
            "path": _repo_path(artifact, has_merged_model),
            "description": KIND_DESCRIPTIONS[artifact.kind],
            "size": _format_size(artifact.size_bytes),
        }


def _repo_path(artifact: ArtifactRecord, has_merged_model: bool) -> str:
    """The path of an artifact in the repository, as jobs/runtime/hub.py uploads it."""
    if not artifact.key.endswith("/"):
        return artifact.key.rpartition("/")[2]
    return {"adapter": "adapter/" if has_merged_model else "adapter_model.safetensors", "onnx": "onnx/"}.get(
        artifact.kind, "model.safetensors"
    )


def _eval_results(record: RunRecord, task: str) -> "Iterator[EvalResult]":
    from huggingface_hub import EvalResult

    for name, value in _metric_values(record.metrics).items():
        yield EvalResult(
            task_type=task,
            dataset_type=record.dataset.processed_dataset_id,
            dataset_name=record.dataset.name,
            dataset_split="eval",
            dataset_revision=record.dataset.digest or None,
            metric_type=name.removeprefix("eval_"),
            metric_value=value,
        )


def _metric_values(metrics: EvalMetrics | None) -> dict[str, float]:
    if metrics is None:
        return {}
    values = {
        "eval_loss": metrics.eval_loss,
        "perplexity": metrics.perplexity,
        "content_perplexity": metrics.content_perplexity,
        "accuracy": metrics.accuracy,
        **metrics.values,
    }
    return {name: value for name, value in values.items() if value is not None}


def _evaluation_note(metrics: EvalMetrics | None) -> str:
    if metrics is None or metrics.eval_rows is None:
        return "Base and tuned model were evaluated on the same rows."
    tokens = f", {metrics.eval_tokens} labeled tokens" if metrics.eval_tokens is not None else ""
    return f"Base and tuned model were evaluated on the same {metrics.eval_rows} rows{tokens}."


def _license_text(base_id: str, base_license: License) -> str:
    terms = f" The terms are in {', '.join(f'`{name}`' for name in base_license.files)}." if base_license.files else ""
    if base_license.hub_id == "gemma":
        return (
            f"This is a Model Derivative of {base_id}: the [Gemma Terms of Use]({GEMMA_TERMS}), including their use restrictions, apply "
            f"to it, and every distribution of it must include them.{terms}"
        )
    if base_license.hub_id:
        name = base_license.name or base_license.hub_id
        license_name = f"[{name}]({base_license.link})" if base_license.link else name
        return f"The license of {base_id} is {license_name}. It applies to this model too.{terms}"
    return f"The files of {base_id} do not name its license; its terms apply to this model too.{terms}"


def _format_cell(value: object) -> str:
    """A value as the text of a table cell, without newlines, cell borders and markup."""
    text = "yes" if value is True else "no" if value is False else str(value)
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _format_number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"


def _format_percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _format_bounds(check: GateCheck) -> str:
    parts = [
        f"at most {check.at_most:.4g}" if check.at_most is not None else "",
        f"at least {check.at_least:.4g}" if check.at_least is not None else "",
    ]
    return ", ".join(part for part in parts if part) or "unknown"


def _format_size(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e8 else f"{size_bytes / 1e6:.1f} MB"
