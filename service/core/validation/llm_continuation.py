"""Language models that start from the model of an earlier job: which of its files, and what can then be published.

An adapter is merged into its base before the training, so that the reference of DPO, KTO and GRPO is the earlier model. A new adapter then
trains on top. What is published applies to the original base again: an adapter of both ranks, the sum of the two. That sum exists for plain
LoRA only, and only where both adapters name their layers alike.
"""

import hashlib

from schema.job import Artifact, EarlierModel, Job
from schema.training import IngestConfig, TrainingConfig
from service.core.errors import InvalidRequest

BASE_PARAM = "training_config.base_model_id"
ARTIFACT_KINDS = ("adapter", "merged")  # what a training can start from, the better first: an adapter's numbers are not rounded


def start_from_model(config: TrainingConfig, earlier: Job) -> tuple[TrainingConfig, EarlierModel]:
    """The configuration with the original base and a format that can be published, and the model to start from. Raises InvalidRequest."""
    trained = earlier.training_config
    if isinstance(trained, IngestConfig) or trained.family != config.family:
        raise _refusal(f"{earlier.job_id} trained no language model", "name a job that did")
    if trained.trainer_type == "reward" and config.trainer_type != "reward":
        message = f"{earlier.job_id} trained a reward model, which gives scores and cannot learn to answer"
        raise _refusal(message, "start from the job whose model it scores, or use trainer_type 'reward'")
    artifact = _pick_artifact(earlier)
    in_adapter = artifact.kind == "adapter" and not _has_dora(trained) and not _has_dora(config) and _kind_of(trained) == _kind_of(config)
    source = EarlierModel(
        job_id=earlier.job_id,
        trainer_type=trained.trainer_type,
        modality=trained.modality,
        kind=artifact.kind,
        key=artifact.key,
        digest=_digest(artifact),
        in_adapter=in_adapter and config.method != "Full",
    )
    config = config.model_copy(update={"base_model_id": trained.base_model_id})
    return choose_exports(config, source, "training_config.export_config"), source


def choose_exports(config: TrainingConfig, source: EarlierModel, path: str) -> TrainingConfig:
    """The configuration, with `merged` in place of a default that cannot be published. Raises InvalidRequest for one that was sent."""
    if source.in_adapter or config.method == "Full":
        return config
    export = config.export_config
    reason = (
        f"the whole model of {source.job_id} is its base"
        if source.kind != "adapter"
        else "the adapter of an earlier job and a new one add up to one adapter only if both are plain LoRA of the same kind of model"
    )
    if export.include_lora_gguf:
        raise InvalidRequest(
            f"include_lora_gguf is not possible here: {reason}", hint="use include_gguf", param=f"{path}.include_lora_gguf"
        )
    if "adapter" not in export.formats:
        return config
    if "format" in export.model_fields_set:
        raise InvalidRequest(f"format 'adapter' is not possible here: {reason}", hint="use format 'merged'", param=f"{path}.format")
    return config.model_copy(update={"export_config": export.model_copy(update={"format": "merged"})})


def _pick_artifact(earlier: Job) -> Artifact:
    """The artifact to start from. Raises InvalidRequest that says what would make one."""
    for kind in ARTIFACT_KINDS:
        for artifact in earlier.artifacts:
            if artifact.kind == kind and artifact.key.endswith("/"):
                return artifact
    published = ", ".join(artifact.name for artifact in earlier.artifacts) or "nothing"
    wanted = "merged" if earlier.training_config.summarize().method == "Full" else "adapter"
    hint = f"POST /jobs/{earlier.job_id}/export with format '{wanted}' publishes one; then name the job that exports it"
    raise _refusal(f"{earlier.job_id} published {published}; a training starts from an adapter or a merged model", hint)


def _has_dora(config: TrainingConfig) -> bool:
    return config.method != "Full" and config.hyperparameters.use_dora


def _kind_of(config: TrainingConfig) -> str:
    """Models of one kind name their layers alike."""
    return "score" if config.trainer_type == "reward" else config.modality


def _digest(artifact: Artifact) -> str:
    lines = "\n".join(f"{file.path} {file.sha256}" for file in sorted(artifact.files, key=lambda file: file.path))
    return f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"


def _refusal(message: str, hint: str) -> InvalidRequest:
    return InvalidRequest(message, hint=hint, param=BASE_PARAM)
