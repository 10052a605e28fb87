"""Fixtures and factories: a tiny Gemma in an object store, training rows, the context of an attempt, and a fake service."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from pkgutil import resolve_name
from typing import Any
from uuid import uuid4

import pytest

from jobs.llm.chat_format import ChatFormat, choose_chat_format
from jobs.llm.data.tokenize import RowTokenizer
from jobs.llm.trained_model import TrainedModel
from jobs.runtime.checkpoints import Checkpoints
from jobs.runtime.context import JobContext, Secrets, StopSignal, Stores
from jobs.runtime.stop import NeverStop
from schema.checkpoint import MANIFEST, Checkpoint, checkpoints_prefix
from schema.dataset import Dataset, Split
from schema.egress import EGRESS_VARIABLE, EgressPolicy
from schema.events import DecisionMade, EvaluationCompleted, Event, MetricsLogged, WarningRaised
from schema.job import Progress
from schema.spec import JobSpec
from schema.training import TRAINING_CONFIG
from tests.jobs.fake_service import FakeService
from tests.tiny_gemma import build_tiny_gemma

BASE = "tiny/gemma"
WORDS = ["files", "copy", "open", "close", "read", "write", "path", "name", "value", "number", "string", "object", "call"]


def pytest_configure(config: pytest.Config) -> None:
    """Ignore warnings raised inside the libraries."""
    for library in ("transformers", "peft", "torch", "accelerate"):
        for kind in ("FutureWarning", "DeprecationWarning", "UserWarning"):
            config.addinivalue_line("filterwarnings", f"ignore::{kind}:{library}")


def messages(count: int, first: int = 0) -> list[dict[str, Any]]:
    """Short conversations, all different."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"what does {WORDS[n % 13]} do {n}"},
                {"role": "assistant", "content": f"it returns a {WORDS[(3 * n) % 13]}" + f" {WORDS[n % 7]}" * (n % 4)},
            ]
        }
        for n in range(first, first + count)
    ]


@dataclass
class EventRecorder:
    """An event sink that stores every event."""

    events: list[Event] = field(default_factory=list)
    progress: list[Progress] = field(default_factory=list)

    def report(self, event: Event) -> None:
        self.events.append(event)

    def set_progress(self, *, phase: Any = None, progress: Progress | None = None) -> None:
        self.progress += [progress] if progress else []

    @property
    def points(self) -> list[MetricsLogged]:
        return [event for event in self.events if isinstance(event, MetricsLogged)]

    @property
    def evaluations(self) -> list[EvaluationCompleted]:
        return [event for event in self.events if isinstance(event, EvaluationCompleted)]

    @property
    def warnings(self) -> dict[str, str]:
        return {event.code: event.message for event in self.events if isinstance(event, WarningRaised)}

    @property
    def decisions(self) -> dict[str, str]:
        return {event.setting: event.value for event in self.events if isinstance(event, DecisionMade)}


@dataclass
class FinishedTraining:
    """A finished training with its model, events and files."""

    model: TrainedModel
    record: EventRecorder
    workdir: Path
    context: JobContext

    @property
    def checkpoints(self) -> list[int]:
        """The steps of all checkpoints, once their uploads are complete."""
        self.context.checkpoints.wait_until_uploaded()
        return saved_steps(self.context.spec)

    def weights(self) -> dict[str, Any]:
        return load_weights(self.model.folder)

    def lora_weights(self) -> dict[str, Any]:
        return {name: tensor for name, tensor in self.weights().items() if "lora_" in name}


def load_weights(folder: Path) -> dict[str, Any]:
    """The tensors of all safetensors files in a folder, by name."""
    from safetensors.torch import load_file

    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def load_saved_checkpoints(spec: JobSpec) -> list[Checkpoint]:
    """The uploaded checkpoints of a job, by attempt and step."""
    folder = Path(spec.stores.models.removeprefix("file://"), spec.checkpoints_prefix)
    return [Checkpoint.load(path.read_bytes()) for path in sorted(folder.glob(f"attempt-*/step-*/{MANIFEST}"))]


def saved_steps(spec: JobSpec) -> list[int]:
    return [checkpoint.step for checkpoint in load_saved_checkpoints(spec)]


@pytest.fixture(autouse=True, scope="session")
def local_egress_policy() -> Iterator[EgressPolicy]:
    """The policy of the local profile, where judges and trackers may be on loopback."""
    policy = EgressPolicy(allow_loopback=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(EGRESS_VARIABLE, policy.model_dump_json())
        yield policy


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an object store that contains the tiny base."""
    root = tmp_path_factory.mktemp("objects")
    build_tiny_gemma(root / "pretrained_weights/huggingface" / BASE)
    return root


@pytest.fixture(scope="session")
def base(store: Path) -> Path:
    return store / "pretrained_weights/huggingface" / BASE


@pytest.fixture(scope="session")
def tokenizer(base: Path) -> Any:
    """The tiny base's tokenizer with Gemma's chat template. Tests must not change it."""
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(base)
    make_chat_format(loaded)
    return loaded


def make_chat_format(tokenizer: Any) -> ChatFormat:
    """The format of a request that says nothing about it; the tokenizer gets its template."""
    return choose_chat_format(tokenizer, TRAINING_CONFIG.validate_python({"base_model_id": BASE}))


def make_row_tokenizer(tokenizer: Any) -> RowTokenizer:
    """Tokenizes rows as a request that says nothing about it."""
    return RowTokenizer(tokenizer, make_chat_format(tokenizer))


def put_split(store: Path, key: str, rows: list[dict[str, Any]]) -> Split:
    """Store rows as a split of a dataset."""
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path = store / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return Split(rows=len(rows), size_bytes=len(content), sha256=sha256(content).hexdigest(), key=key)


def make_spec(
    store: Path,
    *,
    job_id: str | None = None,
    train: list[dict[str, Any]] | None = None,
    held_out: list[dict[str, Any]] | None = None,
    dataset_type: str = "messages",
    columns: tuple[str, ...] = (),
    **config: Any,
) -> JobSpec:
    """A small job of at most ten steps; `config` changes its training config. Without `job_id`, its id is new: it finds no checkpoints."""
    job_id = job_id or f"job-{uuid4().hex[:12]}"
    splits = {"train": put_split(store, f"datasets/{job_id}/train.jsonl", messages(24) if train is None else train)}
    if held_out != []:
        splits["eval"] = put_split(store, f"datasets/{job_id}/eval.jsonl", held_out or messages(5, first=100))
    hyperparameters = {"max_steps": 4, "batch_size": 2, "gradient_accumulation_steps": 1, "logging_steps": 1, "save_strategy": "no"}
    hyperparameters |= {"max_seq_length": 128, "lora_rank": 4} if config.get("method") != "Full" else {"max_seq_length": 128}
    hyperparameters |= config.pop("hyperparameters", {})
    config["eval_config"] = {"sample_prompts": 0} | config.get("eval_config", {})  # generation is slow, and most tests are not about it
    dataset = Dataset.model_validate(
        {"processed_dataset_id": "d", "tenant_id": "local", "name": "d", "dataset_type": dataset_type, "splits": splits, "digest": ""}
        | {"rows_uploaded": 1, "created_at": "2026-01-01T00:00:00Z", "columns": columns}
    )
    return JobSpec.model_validate(
        {"job_id": job_id, "job_name": "a job", "tenant_id": "local", "dataset": dataset}
        | {"training_config": TRAINING_CONFIG.validate_python({"base_model_id": BASE, "hyperparameters": hyperparameters} | config)}
        | {
            "stores": dict.fromkeys(("datasets", "models", "configs"), f"file://{store}"),
            "checkpoints_prefix": checkpoints_prefix(job_id, None),
        }
    )


def make_context(
    spec: JobSpec,
    workdir: Path,
    record: EventRecorder | None = None,
    secrets: dict[str, str] | None = None,
    *,
    attempt: int = 1,
    stop: StopSignal | None = None,
) -> JobContext:
    """The context of an attempt of the job."""
    workdir.mkdir(parents=True, exist_ok=True)
    stores = Stores(spec.stores)
    checkpoints = Checkpoints(
        store=stores.models,
        spec=spec,
        attempt=attempt,
        folder=workdir / "checkpoints",
        save_total_limit=spec.training_config.hyperparameters.save_total_limit,
        emit=lambda event: context.emit(event),
    )
    context = JobContext(
        spec=spec,
        attempt=attempt,
        workdir=workdir,
        secrets=Secrets(secrets or {}),
        stores=stores,
        event_sink=record or EventRecorder(),
        stop=stop or NeverStop(),
        checkpoints=checkpoints,
    )
    return context


def load_trainer(spec: JobSpec) -> Callable[..., TrainedModel]:
    """The `train` function of the job's trainer type."""
    return resolve_name(spec.training_config.train)


@pytest.fixture
def train(store: Path, tmp_path: Path) -> Callable[..., FinishedTraining]:
    """Trains the tiny base. `spec` has arguments for `make_spec`; the other arguments are hyperparameters."""

    def run(name: str = "one", /, *, spec: dict[str, Any] | None = None, **hyperparameters: Any) -> FinishedTraining:
        record, workdir = EventRecorder(), tmp_path / name
        job = make_spec(store, hyperparameters=hyperparameters, **(spec or {}))
        context = make_context(job, workdir, record)
        model = load_trainer(job)(job.training_config, context)
        return FinishedTraining(model, record, workdir, context)

    return run


@pytest.fixture
def service() -> Iterator[FakeService]:
    """A fake service on a loopback port; the test sets its answers."""
    with FakeService() as running:
        yield running
