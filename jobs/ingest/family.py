"""The functions of the family that an attempt calls: download a source, let a process of its own read it, upload the splits.

The files of a source were made by others, so what reads them is a child process without secrets and network, with limits of memory
(`python -m jobs.ingest`). This process only downloads, waits and uploads.
"""

import json
import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from jobs.ingest.sources import Downloaded, SourceRequest, download
from jobs.runtime import isolated_process
from jobs.runtime.context import JobContext
from jobs.runtime.errors import JobFailed
from jobs.runtime.family import FinalizeArtifacts
from jobs.runtime.files import sha256_of
from jobs.runtime.retry import download_with_retry, retry_store, upload_with_retry
from jobs.runtime.settings import child_environment, read_egress_policy
from jobs.runtime.subprocesses import REPOSITORY
from schema.ingestion import OUT_OF_MEMORY_TEXTS, IngestOutcome, IngestProgress, IngestTask, RowProblem
from schema.job import Artifact, EvalMetrics, Progress
from schema.models import TOKENIZER_FILES, model_prefix
from schema.result import Ingested
from schema.spec import ingestion_prefix, problems_key
from schema.training.ingest import IngestConfig
from storage.file import LocalStore

log = logging.getLogger(__name__)

OUTCOME_FILE, TASK_FILE, ERRORS_FILE = "outcome.json", "task.json", "errors.log"
SHOWN_PROBLEMS = 3  # in the message of a failure
MAX_RECORDED_PROBLEMS = 100  # in a dataset's record; all that are known lie beside its files
MAX_LOGGED_CHARACTERS = 4000


@dataclass(frozen=True)
class IngestedSource:
    """The rows of a source, as files of this machine. It trained nothing, so most of what the runtime reads is empty."""

    folder: Path
    outcome: IngestOutcome
    source: str
    train_runtime_s: float
    base_folder: Path | None = None
    metrics: EvalMetrics | None = None
    base_metrics: EvalMetrics | None = None
    train_rows: int | None = None
    train_tokens: int | None = None
    step: int | None = None
    cuda: str | None = None


def check_export(training_config: IngestConfig) -> None:
    """A dataset has no formats to choose from."""


def train(config: IngestConfig, context: JobContext) -> IngestedSource:
    """Download and read the source. An attempt always begins at the beginning. Raises JobFailed, Stopped."""
    started = time.monotonic()
    context.enter_phase("downloading")
    request = SourceRequest(
        config=config,
        secrets=context.secrets,
        stores=context.stores,
        folder=_make_empty(context.workdir / "source"),
        policy=read_egress_policy(),
        check_stop=context.check_stop,
    )
    downloaded = download(request)
    log.info("source downloaded", extra={"files": len(downloaded.files)})
    output = _make_empty(context.workdir / "output")
    outcome = _read(config, context, downloaded, output)
    if outcome.rows is None:
        raise _refuse(context, outcome)
    return IngestedSource(output, outcome, downloaded.source, time.monotonic() - started)


def export(trained: IngestedSource, context: JobContext, finalize: FinalizeArtifacts) -> tuple[Artifact, ...]:  # noqa: ARG001
    """Upload the splits below the attempt's own prefix. The service makes the dataset of them. Raises JobFailed, Stopped."""
    context.enter_phase("uploading")
    dataset_id, outcome = context.spec.dataset.processed_dataset_id, trained.outcome
    assert outcome.rows is not None
    prefix = ingestion_prefix(dataset_id, context.attempt)
    for split in outcome.rows.splits.values():
        for name, digest in ((split.file, split.sha256), (split.index_file, None)):
            if name is not None:
                context.check_stop()
                path = trained.folder / name
                upload_with_retry(f"{name} could not be stored", context.stores.datasets, path, prefix + name, digest or sha256_of(path))
    if outcome.problem_count:
        _store_problems(context, outcome)
    report = outcome.report and outcome.report.model_copy(update={"problems": outcome.report.problems[:MAX_RECORDED_PROBLEMS]})
    # The problems lie beside the files, and the first rows in them.
    kept = outcome.model_copy(update={"problems": (), "samples": (), "report": report})
    context.state.ingested = Ingested(outcome=kept, source=trained.source)
    context.check_stop()
    return ()


def _read(config: IngestConfig, context: JobContext, downloaded: Downloaded, output: Path) -> IngestOutcome:
    """Run the pipeline in a process of its own. Raises JobFailed, Stopped."""
    tokenizer = _fetch_tokenizer(config, context)
    context.enter_phase("reading")
    task = IngestTask(
        files=downloaded.files,
        options=config.options,
        limits=config.limits,
        output=str(output),
        tokenizer_folder=None if tokenizer is None else str(tokenizer),
    )
    task_file, errors_file = context.workdir / TASK_FILE, context.workdir / ERRORS_FILE
    task_file.write_text(task.model_dump_json())
    with errors_file.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-I", isolated_process.__file__, sys.executable, "-m", "jobs.ingest", str(task_file)],
            cwd=REPOSITORY,
            env=child_environment() | {"PYTHONUTF8": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
    assert process.stdout is not None
    try:
        _follow(process.stdout, context)
        code = process.wait()
    finally:  # also when the attempt is stopped
        process.kill()
        process.wait()
        process.stdout.close()
    if code:
        raise _describe_crash(code, errors_file.read_text(errors="replace"), config)
    return IngestOutcome.load((output / OUTCOME_FILE).read_bytes())


def _follow(lines: Iterable[bytes], context: JobContext) -> None:
    """Turn the lines of the process into progress and phases of the attempt. A step is a row."""
    started, phase = time.monotonic(), "reading"
    for line in lines:
        if not line.startswith(b"{"):
            continue  # whether it has a network
        progress = IngestProgress.load(line)
        if progress.phase == "reporting" and phase != "reporting":
            phase = "reporting"
            context.enter_phase(phase)
        context.report_progress(estimate_progress(progress, time.monotonic() - started))
        context.check_stop()


def estimate_progress(progress: IngestProgress, elapsed_s: float) -> Progress:
    """Rows as steps. How many there are is estimated from the bytes: the files are read from beginning to end."""
    share = min(1.0, progress.bytes_read / progress.total_bytes) if progress.total_bytes else 0.0
    share = 1.0 if progress.phase != "reading" else share
    return Progress(
        step=progress.rows,
        total_steps=max(progress.rows, round(progress.rows / share)) if share else progress.rows,
        epoch=round(share, 4),
        total_epochs=1.0,
        eta_s=round(elapsed_s * (1 - share) / share, 1) if share else None,
    )


def _describe_crash(code: int, output: str, config: IngestConfig) -> JobFailed:
    """The failure for a process that ended without an outcome."""
    log.error("reading failed", extra={"code": code, "output": output[-MAX_LOGGED_CHARACTERS:]})
    if code == -9 or any(text in output for text in OUT_OF_MEMORY_TEXTS):
        limit = config.limits.max_memory_bytes >> 20
        return JobFailed("out_of_memory", f"reading {config.source} takes more than {limit:,} MiB of memory", config.out_of_memory_hint)
    if "No space left on device" in output or "Disk quota exceeded" in output:
        return JobFailed("internal", "no space left on the attempt's disk", "request hardware with a larger disk, or split the source")
    return JobFailed("internal", "the source could not be read because of an error in this deployment", "see GET /jobs/{id}/logs")


def _refuse(context: JobContext, outcome: IngestOutcome) -> JobFailed:
    """The failure for a source of which nothing was kept; everything that is known of it is stored for `GET /datasets/{id}`."""
    _store_problems(context, outcome)
    if outcome.refused is not None:
        return JobFailed("invalid_data", outcome.refused.message, outcome.refused.hint)
    first = "; ".join(_describe_problem(problem) for problem in outcome.problems[:SHOWN_PROBLEMS])
    if outcome.problem_count == 1:
        return JobFailed("invalid_data", f"a row is not valid: {first}", 'correct it, or send on_invalid "drop" to leave it out')
    listed = f"GET /datasets/{context.spec.dataset.processed_dataset_id} lists the first 1,000"
    hint = f'{listed}; correct them, or send on_invalid "drop" to leave them out'
    return JobFailed("invalid_data", f"{outcome.problem_count:,} of {outcome.rows_read:,} rows are not valid: {first}", hint)


def _describe_problem(problem: RowProblem) -> str:
    field = f"{problem.field} " if problem.field else ""
    return f"{problem.place}: {field}{problem.reason}"


def _store_problems(context: JobContext, outcome: IngestOutcome) -> None:
    """Store what is wrong with the rows beside the files of the attempt."""
    key = problems_key(context.spec.dataset.processed_dataset_id, context.attempt)
    content = json.dumps(outcome.model_copy(update={"samples": ()}).model_dump(mode="json"), ensure_ascii=False).encode()
    retry_store("the problems of the rows could not be stored", lambda: context.stores.datasets.write(key, content))


def _fetch_tokenizer(config: IngestConfig, context: JobContext) -> Path | None:
    """The folder of the tokenizer that counts tokens, from the model store; None: none are counted. Raises JobFailed."""
    base, store = config.options.base_model_id, context.stores.models
    if base is None:
        return None
    prefix = model_prefix(base)
    stored = retry_store(f"the tokenizer of {base} cannot be read", lambda: list(store.iter_objects(prefix)), code="internal")
    keys = [each.key for each in stored if each.key.removeprefix(prefix) in TOKENIZER_FILES]
    if not keys:
        hint = "`tunesmith models pull` puts it there; without base_model_id the tokens are not counted"
        raise JobFailed("invalid_config", f"the model store does not have {base}, whose tokenizer counts the tokens", hint)
    if isinstance(store, LocalStore):
        return store.path_for_key(keys[0]).parent
    folder = _make_empty(context.workdir / "base")
    for key in keys:
        download_with_retry(store, key, folder / key.removeprefix(prefix))
    return folder


def _make_empty(folder: Path) -> Path:
    """An empty folder: an earlier process of the attempt may have left files there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
