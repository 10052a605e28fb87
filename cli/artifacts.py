"""Which artifact of a job can talk, and which one to take. Pure: it reads what the API says of a job."""

from collections.abc import Sequence
from dataclasses import dataclass

from cli.errors import CliError
from cli.http_client import Json

TALKING_KINDS = ("gguf", "merged", "adapter")  # in order of preference: a GGUF file starts fastest
FOLDER_KINDS = ("adapter", "merged")  # with a tokenizer's files


@dataclass(frozen=True)
class Choice:
    """The artifact to talk to, and what a person should know about it."""

    artifact: Json
    notes: tuple[str, ...] = ()


def choose_talker(job: Json, name: str | None) -> Choice:
    """The named artifact, or the best one that can talk. Raises CliError, which says what would work."""
    if name is not None:
        return _require_talker(job, name)
    silent = {artifact["name"]: reason for artifact in job["artifacts"] if (reason := explain_silence(job, artifact))}
    talking = sorted(
        (artifact for artifact in job["artifacts"] if artifact["name"] not in silent),
        key=lambda artifact: (is_flagged(artifact), TALKING_KINDS.index(artifact["kind"])),
    )
    if talking:
        return Choice(talking[0], describe_choice(job, talking[0]))
    raise CliError(*_explain_no_talker(job, silent))


def describe_choice(job: Json, chosen: Json) -> tuple[str, ...]:
    """Why this artifact was chosen, if others came first but for a flaw, and a warning if it has the flaw itself."""
    if is_flagged(chosen):
        warning = f"{chosen['name']} is closer to the base than to the trained model: quantization removed the training"
        return (f"warning: {warning}; `tunesmith export {job['job_id']} --gguf q8_0` makes a better one",)
    skipped = [artifact["name"] for artifact in job["artifacts"] if is_flagged(artifact)]
    if not skipped:
        return ()
    verb = "is" if len(skipped) == 1 else "are"
    return (f"{chosen['name']} was chosen: {', '.join(skipped)} {verb} closer to the base than to the trained model",)


def is_flagged(artifact: Json) -> bool:
    """Whether quantization removed the training from a file."""
    fidelity: Json = artifact.get("fidelity") or {}
    return bool(fidelity.get("closer_to_base"))


def explain_silence(job: Json, artifact: Json) -> str | None:
    """Why an artifact cannot talk, and what to use instead; None if it can."""
    name, earlier = artifact["name"], job.get("earlier_model")
    if job["trainer_type"] == "reward":
        return f"{name} is a reward model: it rates answers and writes none; name the job in a grader of trainer_type grpo"
    match artifact["kind"]:
        case "gguf" if name == "gguf-mmproj":
            return f"{name} is the vision part of the GGUF model: it reads images and writes nothing; {_suggest(job, 'gguf')}"
        case "gguf" if name == "gguf-usage":
            return f"{name} says how to run the GGUF files and holds no model; {_suggest(job, 'gguf')}"
        case "adapter" if earlier and not earlier["in_adapter"]:
            return f"{name} applies to the model of job {earlier['job_id']}, from which it was trained; {_suggest(job, 'gguf', 'merged')}"
        case "gguf" | "merged" | "adapter":
            return None
        case "lora_gguf":
            base = "llama.cpp applies it to a GGUF file of the base, which Tunesmith does not store"
            return f"{name} is an adapter alone: {base}; {_suggest(job, *TALKING_KINDS)}"
        case "onnx":
            return f"{name} is a graph without a key-value cache, for scoring and short answers; {_suggest(job, *TALKING_KINDS)}"
        case kind:
            return f"{name} is of the kind {kind}, which does not answer questions"


def _suggest(job: Json, *kinds: str) -> str:
    """What to use instead: artifacts of these kinds, or how to make one."""
    names = [artifact["name"] for artifact in job["artifacts"] if artifact["kind"] in kinds and not is_part(artifact["name"])]
    return f"use {' or '.join(names)}" if names else f"`tunesmith export {job['job_id']} --gguf q8_0` makes a GGUF model"


def is_part(name: str) -> bool:
    """Whether an artifact is only something beside the model's own file."""
    return name in ("gguf-mmproj", "gguf-usage")


def _require_talker(job: Json, name: str) -> Choice:
    names: Sequence[str] = [artifact["name"] for artifact in job["artifacts"]]
    if name not in names:
        if not names:
            raise CliError(*_explain_no_talker(job, {}))
        raise CliError(f"{job['job_id']} has no artifact {name!r}; it has: {', '.join(names)}", exit_code=2, param="--artifact")
    artifact = job["artifacts"][names.index(name)]
    if reason := explain_silence(job, artifact):
        raise CliError(*reason.split("; ", 1))
    return Choice(artifact, describe_choice(job, artifact) if is_flagged(artifact) else ())


def _explain_no_talker(job: Json, silent: dict[str, str]) -> tuple[str, str]:
    job_id = job["job_id"]
    if job["status"] != "completed":
        return f"{job_id} has no model yet: the job is {job['status']}", f"`tunesmith show {job_id}` says more"
    if silent:
        reason, _, advice = next(iter(silent.values())).partition("; ")
        return f"{job_id} has nothing that can talk: {reason}", advice
    if job.get("gate_passed") is False:
        return f"{job_id} published nothing, because it did not pass its gate", f"`tunesmith export {job_id} --gguf q8_0` exports it anyway"
    return f"{job_id} has no artifacts", f"`tunesmith export {job_id} --gguf q8_0` makes a GGUF model"
