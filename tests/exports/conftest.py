"""A tiny Gemma, trained in two ways without a trainer: a LoRA adapter with large weights, and a full model."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.llm.exporters.staging import make_staging_folder
from jobs.llm.llama_cpp.runner import convert
from jobs.llm.trained_model import HeldOutExample, TrainedModel, UserPrompt
from jobs.runtime.checkpoints import Checkpoints
from jobs.runtime.context import JobContext, Secrets, Stores
from jobs.runtime.stop import NeverStop
from schema.dataset import Dataset
from schema.job import Artifact
from schema.spec import JobSpec
from schema.training import SftConfig
from schema.training.llm_fidelity import Fidelity
from tests.jobs.conftest import EventRecorder, make_chat_format
from tests.tiny_gemma import build_tiny_gemma


def pytest_configure(config: pytest.Config) -> None:
    """Ignore warnings raised inside the libraries."""
    for library in ("transformers", "peft", "torch"):
        for kind in ("FutureWarning", "DeprecationWarning", "UserWarning"):
            config.addinivalue_line("filterwarnings", f"ignore::{kind}:{library}")


PROMPTS = ("what does the function do", "copy  the   list of files", "open path and read", "def f(x):\n    return x + 1")

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}\n"
    "{{ message.content }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base in bfloat16, with the layers that llama.cpp assumes of a Gemma 3: every sixth has full attention."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = build_tiny_gemma(tmp_path_factory.mktemp("base"))
    config = AutoConfig.from_pretrained(folder)
    config.num_hidden_layers = 6
    config.layer_types = ["sliding_attention"] * 5 + ["full_attention"]
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.08)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base_gguf(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base as a GGUF file; it has no chat template. Tests must not change it."""
    folder = tmp_path_factory.mktemp("base-gguf")
    staging = make_staging_folder(tiny_base, tiny_base, [tiny_base], folder / "staging")
    convert(staging, folder / "base.gguf", precision="bf16", name="base")
    return folder / "base.gguf"


@pytest.fixture(scope="session")
def held_out_examples(tiny_base: Path) -> tuple[HeldOutExample, ...]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    examples = []
    for question in PROMPTS:
        prompt = f"<bos><start_of_turn>user\n{question}<end_of_turn>\n<start_of_turn>model\n"
        prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
        answer_ids = tokenizer.encode("it returns a list of name value string<end_of_turn>\n", add_special_tokens=False)
        examples.append(HeldOutExample(prompt_text=prompt, input_ids=(*prompt_ids, *answer_ids), prompt_tokens=len(prompt_ids)))
    return tuple(examples)


@pytest.fixture(scope="session")
def adapter(tiny_base: Path, held_out_examples: tuple[HeldOutExample, ...], tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    """A LoRA adapter with a random B matrix, so that tuning changes the predictions."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    tuned = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    tuned.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    (folder / "training_args.bin").write_bytes(b"a file that the trainer writes")
    return replace(
        make_trained_model(folder, tiny_base, held_out_examples, is_adapter=True),
        calibration=tuple(example.input_ids for example in held_out_examples * 4),
    )


@pytest.fixture(scope="session")
def full(tiny_base: Path, held_out_examples: tuple[HeldOutExample, ...], tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    """A fully trained model: the base with noise added."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("full")
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return make_trained_model(folder, tiny_base, held_out_examples, is_adapter=False)


@pytest.fixture
def record() -> EventRecorder:
    return EventRecorder()


@pytest.fixture
def make_context(tmp_path: Path, record: EventRecorder) -> Callable[..., JobContext]:
    """Makes the context of a job with an export config."""

    def make(method: str = "LoRA", **export_config: Any) -> JobContext:
        return make_job_context(tmp_path, record, method, **export_config)

    return make


def make_job_context(root: Path, record: EventRecorder, method: str = "LoRA", **export_config: Any) -> JobContext:
    spec = make_spec(root, method, export_config)
    workdir = root / "work"
    workdir.mkdir(exist_ok=True)
    stores = Stores(spec.stores)
    checkpoints = Checkpoints(
        store=stores.models, spec=spec, attempt=1, folder=workdir / "checkpoints", save_total_limit=2, emit=record.report
    )
    return JobContext(
        spec=spec,
        attempt=1,
        workdir=workdir,
        secrets=Secrets({}),
        stores=stores,
        event_sink=record,
        stop=NeverStop(),
        checkpoints=checkpoints,
    )


def make_spec(root: Path, method: str, export_config: dict[str, Any]) -> JobSpec:
    url = f"file://{root}/objects"
    config = {"base_model_id": "google/gemma-3-270m", "method": method, "export_config": export_config}
    dataset = Dataset.model_validate(
        {"processed_dataset_id": "d", "tenant_id": "local", "name": "d", "dataset_type": "messages", "splits": {}, "digest": ""}
        | {"rows_uploaded": 1, "created_at": "2026-01-01T00:00:00Z"}
    )
    return JobSpec(
        job_id="job-1",
        job_name="a job",
        tenant_id="local",
        training_config=SftConfig.model_validate(config),
        dataset=dataset,
        checkpoints_prefix="checkpoints/test-jobs/job_job-1/",
        stores={"datasets": url, "models": url, "configs": url},  # pyright: ignore[reportArgumentType]  # pydantic converts it
    )


def fidelity_of(artifact: Artifact) -> Fidelity:
    """The artifact's measured fidelity, which it must have."""
    assert artifact.fidelity is not None
    return Fidelity.model_validate(artifact.fidelity)


def make_trained_model(folder: Path, base: Path, held_out_examples: tuple[HeldOutExample, ...], *, is_adapter: bool) -> TrainedModel:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    has_template = bool(tokenizer.chat_template)
    return TrainedModel(
        folder=folder,
        is_adapter=is_adapter,
        base_folder=base,
        held_out_examples=held_out_examples,
        chat_format=make_chat_format(tokenizer),
        user_prompts=make_user_prompts(held_out_examples) if has_template else (),
        metrics=None,
        base_metrics=None,
        train_rows=1,
        train_tokens=1,
        train_runtime_s=1.0,
    )


def make_user_prompts(examples: tuple[HeldOutExample, ...]) -> tuple[UserPrompt, ...]:
    """The questions of `held_out_examples`."""
    pairs = zip(PROMPTS, examples, strict=False)
    return tuple(
        UserPrompt(({"role": "user", "content": question},), (), None, example.input_ids, example.prompt_tokens)
        for question, example in pairs
    )


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())
