"""Checks what an attempt sends before a record takes it: an attempt runs other people's models and code, and may say anything.

It can publish only what lies below its own prefix, and name only addresses that are safe to follow. Where an object lies is computed
here from its key; the address that the attempt sent is ignored.
"""

import re
from collections.abc import Sequence
from urllib.parse import urlsplit

from schema.dataset import EVAL_SPLIT, TRAIN_SPLIT
from schema.events import ArtifactUploaded, Event, EventBatch, ReportedEvent, StatusChanged, TrackerStarted
from schema.job import Artifact, ArtifactFile, HubPush, Job
from schema.result import Result
from schema.spec import artifact_key
from schema.training import IngestConfig
from service.core.errors import InvalidRequest

ARTIFACT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
HUB_REVISION = re.compile(r"[A-Za-z0-9._-]{1,128}")
SHA256 = re.compile(r"[0-9a-f]{64}")
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\\]")
MAX_KEY_CHARACTERS = 1024  # of Cloud Storage and S3
MAX_ARTIFACTS = 100
MAX_URL_CHARACTERS = 4096


def check_result(job: Job, result: Result, models_url: str) -> Result:
    """The result with the address of each artifact as the service computes it. Raises InvalidRequest."""
    names = [artifact.name for artifact in result.artifacts]
    if len(names) > MAX_ARTIFACTS or len(set(names)) < len(names):
        raise InvalidRequest(f"an attempt has at most {MAX_ARTIFACTS} artifacts, each with a name of its own", param="artifacts")
    artifacts = tuple(
        _check_artifact(job, result.attempt, artifact, models_url, f"artifacts.{index}") for index, artifact in enumerate(result.artifacts)
    )
    for tracker, url in result.tracker_urls.items():
        _check_tracker_url(job, url, models_url, f"tracker_urls.{tracker}")
    if result.wandb_url is not None:
        _check_web_url(result.wandb_url, "wandb_url")
    _check_ingested(job, result)
    return result.model_copy(update={"artifacts": artifacts})


def _check_ingested(job: Job, result: Result) -> None:
    """A completed ingestion says what it kept; no other result does. The files' keys are computed from their names."""
    ingested, makes_dataset = result.ingested, isinstance(job.training_config, IngestConfig)
    if (ingested is not None) != (makes_dataset and result.outcome == "completed"):
        raise InvalidRequest("rows are reported by a completed ingestion, and by nothing else", param="ingested")
    if ingested is None:
        return
    rows = ingested.outcome.rows
    if rows is None or TRAIN_SPLIT not in rows.splits or not rows.splits.keys() <= {TRAIN_SPLIT, EVAL_SPLIT}:
        raise InvalidRequest(f"a dataset has the split {TRAIN_SPLIT}, and may have {EVAL_SPLIT}", param="ingested.outcome.rows")
    for name, split in rows.splits.items():
        param = f"ingested.outcome.rows.splits.{name}"
        if not all(ARTIFACT_NAME.fullmatch(file) for file in (split.file, split.index_file) if file is not None):
            raise InvalidRequest("a file's name has letters, digits, '.', '_' and '-' only", param=f"{param}.file")
        if split.rows < 1 or split.size_bytes < 0:
            raise InvalidRequest("a split has rows, and a size of 0 bytes or more", param=f"{param}.rows")
        if not SHA256.fullmatch(split.sha256):
            raise InvalidRequest("a SHA-256 is 64 hexadecimal digits", param=f"{param}.sha256")
    if len(ingested.source) > MAX_URL_CHARACTERS or UNPRINTABLE.search(ingested.source):
        raise InvalidRequest("a source is one line of printable characters", param="ingested.source")


def check_batch(job: Job, number: int, batch: EventBatch, models_url: str) -> EventBatch:
    """The batch with the address of each artifact as the service computes it. Raises InvalidRequest."""
    events = [
        reported.model_copy(update={"event": _check_event(job, number, reported.event, models_url, f"events.{index}.event")})
        if isinstance(reported.event, ArtifactUploaded | TrackerStarted | StatusChanged)
        else reported
        for index, reported in enumerate(batch.events)
    ]
    return batch if _are_identical(events, batch.events) else batch.model_copy(update={"events": events})


def _are_identical(checked: Sequence[ReportedEvent], reported: Sequence[ReportedEvent]) -> bool:
    return all(one is other for one, other in zip(checked, reported, strict=True))


def _check_event(job: Job, number: int, event: Event, models_url: str, param: str) -> Event:
    match event:
        case StatusChanged():
            raise InvalidRequest("only the service reports a job's status", param=param)
        case ArtifactUploaded(artifact=artifact):
            return event.model_copy(update={"artifact": _check_artifact(job, number, artifact, models_url, f"{param}.artifact")})
        case TrackerStarted(url=str(url)):
            _check_tracker_url(job, url, models_url, f"{param}.url")
            return event
        case _:
            return event


def _check_artifact(job: Job, number: int, artifact: Artifact, models_url: str, param: str) -> Artifact:
    """The artifact with its address in the model bucket."""
    config = job.training_config
    if not ARTIFACT_NAME.fullmatch(artifact.name):
        raise InvalidRequest("an artifact's name has letters, digits, '.', '_' and '-' only", param=f"{param}.name")
    if artifact.kind not in {info.name for info in config.artifact_kinds}:
        raise InvalidRequest(f"{config.trainer_type_name()} makes no artifact of the kind {artifact.kind!r}", param=f"{param}.kind")
    prefix = artifact_key(config.artifact_folder(artifact.kind), job.job_id, number)
    if not artifact.key.startswith(prefix) or not _is_canonical_key(artifact.key.removesuffix("/")):
        raise InvalidRequest(f"attempt {number} may publish only what lies below {prefix}", param=f"{param}.key")
    if artifact.size_bytes < 0:
        raise InvalidRequest("a size is 0 bytes or more", param=f"{param}.size_bytes")
    is_folder = artifact.key.endswith("/")
    if not is_folder and (not artifact.files or artifact.files[0].path):
        message = "an artifact whose key has no '/' at its end begins with that file, with an empty path"
        raise InvalidRequest(message, param=f"{param}.files")
    if len({artifact.file_key(file) for file in artifact.files}) < len(artifact.files):
        raise InvalidRequest("two files have the same path", param=f"{param}.files")
    for index, file in enumerate(artifact.files):
        _check_file(file, f"{param}.files.{index}", is_named_by_key=index == 0 and not is_folder)
    if artifact.hub is not None:
        _check_hub_push(job, artifact.hub, f"{param}.hub")
    return artifact.model_copy(update={"uri": f"{models_url}/{artifact.key}"})


def _check_file(file: ArtifactFile, param: str, *, is_named_by_key: bool) -> None:
    if not is_named_by_key and not _is_canonical_key(file.path):
        raise InvalidRequest("a file's path is relative to its artifact and has no '..' or empty part", param=f"{param}.path")
    if file.size_bytes < 0:
        raise InvalidRequest("a size is 0 bytes or more", param=f"{param}.size_bytes")
    if not SHA256.fullmatch(file.sha256):
        raise InvalidRequest("a SHA-256 is 64 hexadecimal digits", param=f"{param}.sha256")


def _check_hub_push(job: Job, push: HubPush, param: str) -> None:
    """The repository must be the one that the request names; without an owner in the name, the Hub adds the token's account."""
    requested = job.training_config.export_config.hf_repo_id
    owner, _, name = push.repo_id.rpartition("/")
    is_requested = requested is not None and (push.repo_id == requested or ("/" not in requested and name == requested))
    if not is_requested or (owner and not ARTIFACT_NAME.fullmatch(owner)):
        raise InvalidRequest(f"the job pushes to {requested or 'no repository'}", param=f"{param}.repo_id")
    if not HUB_REVISION.fullmatch(push.revision):
        raise InvalidRequest("a revision is a commit's id", param=f"{param}.revision")
    _check_web_url(push.url, f"{param}.url")
    if not urlsplit(push.url).path.endswith(f"/{push.repo_id}/tree/{push.revision}"):
        raise InvalidRequest("the address is not that of the pushed commit", param=f"{param}.url")


def _check_tracker_url(job: Job, url: str, models_url: str, param: str) -> None:
    """A page on the web, or the run's files in the model bucket, where some trackers keep them."""
    prefix = f"{models_url}/trackers/{job.job_id}/"
    if not (url.startswith(prefix) and _is_canonical_key(url.removeprefix(prefix))):
        _check_web_url(url, param)


def _check_web_url(url: str, param: str) -> None:
    try:
        parts = urlsplit(url)
        is_web_url = parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in parts.netloc
    except ValueError:
        is_web_url = False
    if not is_web_url or UNPRINTABLE.search(url) or " " in url or len(url) > MAX_URL_CHARACTERS:
        raise InvalidRequest("only an http or https URL without a password is accepted here", param=param)


def _is_canonical_key(key: str) -> bool:
    """Whether every reader takes the key for the same object: no empty part, no '.' or '..', nothing encoded."""
    if len(key) > MAX_KEY_CHARACTERS or UNPRINTABLE.search(key) or "%" in key:  # "%2e%2e" in a file:// address is "..", for some readers
        return False
    return all(part not in ("", ".", "..") for part in key.split("/"))
