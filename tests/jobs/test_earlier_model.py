"""A training that starts from the model of an earlier job: what it learns from, what it compares with, and what it publishes."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from jobs.llm.adapter_sum import AdapterMismatch, check_summable, copy_adapter_config, write_sum
from jobs.llm.exporters import export_all
from jobs.llm.trained_model import TrainedModel
from jobs.runtime.context import JobContext
from jobs.runtime.errors import JobFailed
from schema.job import Artifact, EarlierModel, Failure
from schema.spec import JobSpec
from tests.jobs.conftest import EventRecorder, load_trainer, load_weights, make_context, make_spec, messages
from tests.jobs.test_continuation import TrainingRun
from tests.jobs.test_preferences import pairs

HYPERPARAMETERS: dict[str, Any] = {"learning_rate": 5e-3, "warmup_ratio": 0.0, "lr_scheduler_type": "constant", "lora_dropout": 0.0}
MAX_DIFFERENCE = 1e-4  # of logits in float32


@dataclass(frozen=True)
class EarlierJob:
    """A finished job with its published artifacts."""

    model: TrainedModel
    context: JobContext
    artifacts: tuple[Artifact, ...]

    def source(self, kind: str = "adapter", *, in_adapter: bool = True) -> EarlierModel:
        (key,) = [artifact.key for artifact in self.artifacts if artifact.kind == kind]
        spec = self.context.spec
        return EarlierModel(
            job_id=spec.job_id,
            trainer_type=spec.training_config.trainer_type,
            modality="text",
            kind=kind,
            key=key,
            digest="sha256:0",
            in_adapter=in_adapter,
        )


def run_job(spec: JobSpec, workdir: Path) -> EarlierJob:
    context = make_context(spec, workdir)
    model = load_trainer(spec)(spec.training_config, context)
    return EarlierJob(model, context, export_all(model, context))


def make_dpo_spec(store: Path, source: EarlierModel, **config: Any) -> JobSpec:
    config = {"trainer_type": "dpo", "export_config": {"format": "adapter"}} | config
    hyperparameters = HYPERPARAMETERS | {"save_strategy": "steps", "save_steps": 2} | config.pop("hyperparameters", {})
    rows = {"train": pairs(12), "held_out": pairs(4, first=100), "dataset_type": "preference"}
    spec = make_spec(store, hyperparameters=hyperparameters, **rows, **config)
    return spec.model_copy(update={"earlier_model": source})


@pytest.fixture(scope="module")
def sft(store: Path, tmp_path_factory: pytest.TempPathFactory) -> EarlierJob:
    """A chat model of a base without a chat template: the embeddings of its turn tokens are trained as well."""
    hyperparameters = HYPERPARAMETERS | {"max_steps": 8, "use_rslora": True, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"]}
    spec = make_spec(store, train=messages(16), hyperparameters=hyperparameters, export_config={"format": ["adapter", "merged"]})
    return run_job(spec, tmp_path_factory.mktemp("sft"))


@pytest.fixture(scope="module")
def dpo(sft: EarlierJob, store: Path, tmp_path_factory: pytest.TempPathFactory) -> EarlierJob:
    return run_job(make_dpo_spec(store, sft.source()), tmp_path_factory.mktemp("dpo"))


def load_adapted(base: Path, adapter: Path) -> Any:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(adapter)).eval()


def compute_logits(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(input_ids=torch.arange(2, 60).reshape(2, 29)).logits


def load_merged(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def difference(first: Any, second: Any) -> float:
    return float((first - second).abs().max())


# --- SFT -> DPO ---


def test_reference_of_dpo_is_the_earlier_model(sft: EarlierJob, dpo: EarlierJob, base: Path) -> None:
    started_from = compute_logits(load_merged(dpo.context.workdir / "data/base"))
    assert difference(started_from, compute_logits(load_adapted(base, sft.model.folder))) < MAX_DIFFERENCE
    assert difference(started_from, compute_logits(load_merged(base))) > 0.1
    before = dpo.model.base_metrics
    assert before is not None
    assert before.values["rewards/margins"] == 0  # against a reference that differed from the model, it would not be


def test_published_adapter_on_the_original_base_is_the_trained_model(dpo: EarlierJob, base: Path) -> None:
    (published,) = dpo.artifacts
    folder = Path(dpo.context.spec.stores.models.removeprefix("file://"), published.key)
    on_base = compute_logits(load_adapted(base, folder))
    checkpoints = dpo.context.checkpoints
    checkpoints.wait_until_uploaded()
    latest = checkpoints.fetch_latest()
    assert latest is not None
    trained = compute_logits(load_adapted(dpo.context.workdir / "data/base", latest.folder))
    assert difference(on_base, trained) < MAX_DIFFERENCE
    assert difference(trained, compute_logits(load_merged(dpo.context.workdir / "data/base"))) > 10 * MAX_DIFFERENCE
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["base_model_name_or_path"]) == (8, 8, "tiny/gemma")
    assert len(settings["trainable_token_indices"]) == 2
    assert (folder / "chat_template.jinja").is_file()


def test_trained_model_belongs_to_the_original_base(dpo: EarlierJob, base: Path) -> None:
    digests = {path.name: path.resolve() for path in dpo.model.base_folder.glob("*.safetensors")}
    assert digests == {path.name: path.resolve() for path in base.glob("*.safetensors")}


def test_decisions_name_the_earlier_job(sft: EarlierJob, dpo: EarlierJob) -> None:
    assert dpo.context.state.decisions["earlier_model"].startswith(sft.context.spec.job_id)


def test_chain_continues_the_published_sum(dpo: EarlierJob, store: Path, base: Path, tmp_path: Path) -> None:
    third = run_job(make_dpo_spec(store, dpo.source(), hyperparameters={"max_steps": 2}), tmp_path)
    settings = json.loads((third.model.folder / "adapter_config.json").read_text())
    assert settings["r"] == 12
    started_from = compute_logits(load_merged(tmp_path / "data/base"))
    assert difference(started_from, compute_logits(load_adapted(base, dpo.model.folder))) < MAX_DIFFERENCE


def test_interrupted_training_continues_exactly(sft: EarlierJob, dpo: EarlierJob, store: Path, tmp_path: Path) -> None:
    spec = make_dpo_spec(store, sft.source())
    run = TrainingRun(spec, tmp_path)
    assert run.run_attempt(stop_after=2) == "pause"
    resumed = load_weights(run.finish().folder)
    whole = load_weights(dpo.model.folder)
    assert resumed.keys() == whole.keys()
    assert all((resumed[name] == whole[name]).all() for name in whole)


# --- other forms ---


def test_whole_model_is_the_base(sft: EarlierJob, store: Path, tmp_path: Path) -> None:
    source = sft.source("merged", in_adapter=False)
    spec = make_dpo_spec(store, source, hyperparameters={"max_steps": 2}, export_config={"format": "merged"})
    job = run_job(spec, tmp_path)
    (merged,) = job.artifacts
    earlier = compute_logits(load_merged(store / source.key))
    assert difference(compute_logits(load_merged(job.context.workdir / "data/base")), earlier) == 0
    published = compute_logits(load_merged(store / merged.key))
    assert 0 < difference(published, earlier) < 10
    assert job.model.base_folder == job.context.workdir / "data/base"


def test_full_training_starts_from_an_adapter(sft: EarlierJob, store: Path, base: Path, tmp_path: Path) -> None:
    spec = make_dpo_spec(store, sft.source(in_adapter=False), method="Full", hyperparameters={"max_steps": 1, "learning_rate": 1e-7})
    context = make_context(spec, tmp_path)
    model = load_trainer(spec)(spec.training_config, context)
    assert difference(compute_logits(load_merged(model.folder)), compute_logits(load_adapted(base, sft.model.folder))) < 0.01
    assert [path.resolve() for path in model.base_folder.glob("*.safetensors")] == [path.resolve() for path in base.glob("*.safetensors")]


@pytest.mark.nightly
def test_dora_on_an_earlier_adapter_is_published_merged(sft: EarlierJob, store: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"hyperparameters": {"max_steps": 1, "use_dora": True}, "export_config": {"format": "merged"}}
    job = run_job(make_dpo_spec(store, sft.source(in_adapter=False), **changes), tmp_path)
    earlier = compute_logits(load_merged(tmp_path / "data/base"))
    assert difference(compute_logits(load_merged(store / job.artifacts[0].key)), earlier) < 1.0


def start(spec: JobSpec, workdir: Path) -> Failure:
    with pytest.raises(JobFailed) as excinfo:
        load_trainer(spec)(spec.training_config, make_context(spec, workdir, EventRecorder()))
    return excinfo.value.failure


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_deleted_earlier_model_fails_the_attempt_clearly(sft: EarlierJob, store: Path, tmp_path: Path, kind: str) -> None:
    source = sft.source(kind).model_copy(update={"key": f"trained_adapters/{kind}-of-a-deleted-job/attempt-1/"})
    failure = start(make_dpo_spec(store, source), tmp_path)
    assert failure.code == "invalid_config"
    assert f"the model of job {source.job_id}" in failure.message
    assert "base_model_id" in failure.hint


def test_damaged_earlier_adapter_fails_the_attempt_clearly(sft: EarlierJob, store: Path, tmp_path: Path) -> None:
    source = sft.source().model_copy(update={"key": "trained_adapters/damaged/attempt-1/"})
    folder = store / source.key
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(b"no tensors")
    (folder / "adapter_config.json").write_text("{")
    assert "its config is not JSON" in start(make_dpo_spec(store, source), tmp_path / "a").message
    (folder / "adapter_config.json").write_bytes((sft.model.folder / "adapter_config.json").read_bytes())
    assert "its weights cannot be read" in start(make_dpo_spec(store, source), tmp_path / "b").message


# --- the sum of two adapters ---


@pytest.fixture
def write_adapter(tmp_path: Path) -> Callable[..., Path]:
    """Writes an adapter of random numbers for two layers of 6 inputs and 5 outputs; `rows` has trained embeddings by token."""

    def write(name: str, layers: dict[str, int], rows: dict[int, float] | None = None, **settings: Any) -> Path:
        import torch
        from safetensors.torch import save_file

        generator = torch.Generator().manual_seed(len(name))
        tensors = {}
        for layer, rank in layers.items():
            tensors[f"base_model.model.{layer}.lora_A.weight"] = torch.randn(rank, 6, generator=generator)
            tensors[f"base_model.model.{layer}.lora_B.weight"] = torch.randn(5, rank, generator=generator)
        if rows:
            tensors["base_model.model.embed.token_adapter.trainable_tokens_delta"] = torch.tensor([[value] for value in rows.values()])
            settings["trainable_token_indices"] = list(rows)
        folder = tmp_path / name
        folder.mkdir()
        save_file(tensors, folder / "adapter_model.safetensors")
        defaults = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q"], "task_type": "CAUSAL_LM"}
        (folder / "adapter_config.json").write_text(json.dumps(defaults | settings))
        return folder

    return write


def read_sum(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    return load_weights(folder), json.loads((folder / "adapter_config.json").read_text())


def update_of(tensors: dict[str, Any], layer: str) -> Any:
    name = f"base_model.model.{layer}"
    return tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]


def test_sum_adds_the_scaled_updates_of_every_layer(write_adapter: Callable[..., Path], tmp_path: Path) -> None:
    pattern = {"rank_pattern": {"a.v": 2}, "alpha_pattern": {"a.v": 3}}
    earlier = write_adapter("earlier", {"a.q": 4, "a.v": 2}, **pattern, target_modules=["q", "v"])
    later = write_adapter("later", {"a.q": 9, "b.q": 9}, use_rslora=True, r=9, lora_alpha=6)
    first, second = load_weights(earlier), load_weights(later)
    write_sum(earlier, later, tmp_path / "later")
    tensors, settings = read_sum(later)
    expected = {
        "a.q": update_of(first, "a.q") * 8 / 4 + update_of(second, "a.q") * 6 / 3,
        "a.v": update_of(first, "a.v") * 3 / 2,
        "b.q": update_of(second, "b.q") * 6 / 3,
    }
    for layer, update in expected.items():
        assert difference(update_of(tensors, layer), update) < 1e-5
    assert settings["r"] == settings["lora_alpha"] == 13
    assert (settings["use_rslora"], settings["rank_pattern"], settings["alpha_pattern"]) == (False, {}, {})
    assert settings["target_modules"] == ["a.q", "a.v", "b.q"]
    assert {tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name} == {13}


def test_sum_adds_the_updates_of_every_expert(write_adapter: Callable[..., Path]) -> None:
    experts: dict[str, Any] = {"target_parameters": ["experts.down_proj"]}  # three experts: three times the rank
    earlier = write_adapter("earlier", {"a.q": 2, "a.experts": 6}, r=2, lora_alpha=4, **experts)
    later = write_adapter("later", {"a.q": 4, "a.experts": 12}, r=4, lora_alpha=4, target_modules=["q", "k"], **experts)
    first, second = load_weights(earlier), load_weights(later)
    write_sum(earlier, later, later)
    tensors, settings = read_sum(later)

    def update_of_experts(part: dict[str, Any]) -> Any:
        from torch import einsum

        a, b = part["base_model.model.a.experts.lora_A.weight"], part["base_model.model.a.experts.lora_B.weight"]
        return einsum("ore,eri->eoi", b.reshape(5, -1, 3), a.reshape(3, -1, 6))  # as peft computes it

    assert difference(update_of_experts(tensors), update_of_experts(first) * 2 + update_of_experts(second)) < 1e-5
    assert difference(update_of(tensors, "a.q"), update_of(first, "a.q") * 2 + update_of(second, "a.q")) < 1e-5
    assert (settings["r"], settings["target_modules"], settings["target_parameters"]) == (6, ["a.q"], ["experts.down_proj"])
    other = write_adapter("another", {"a.q": 2})
    with pytest.raises(AdapterMismatch, match="experts"):
        write_sum(earlier, other, other)


def test_later_embedding_of_a_token_counts(write_adapter: Callable[..., Path]) -> None:
    earlier = write_adapter("earlier", {"a.q": 1}, {3: 1.0, 7: 2.0})
    later = write_adapter("later", {"a.q": 1}, {7: 5.0, 5: 4.0})
    write_sum(earlier, later, later)
    tensors, settings = read_sum(later)
    assert settings["trainable_token_indices"] == [3, 5, 7]
    assert tensors["base_model.model.embed.token_adapter.trainable_tokens_delta"].flatten().tolist() == [1.0, 4.0, 5.0]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "biases"),
        ({"trainable_token_indices": {"embed": [1]}}, "by layer"),
    ],
)
def test_adapter_without_a_sum_is_refused(write_adapter: Callable[..., Path], settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(AdapterMismatch, match=reason):
        check_summable(write_adapter("one", {"a.q": 1}, **settings))


def test_config_keeps_only_what_describes_a_lora(write_adapter: Callable[..., Path]) -> None:
    folder = write_adapter("one", {"a.q": 1}, auto_mapping={"x": "y"}, init_lora_weights="pissa", base_model_name_or_path="/etc")
    copy_adapter_config(folder / "adapter_config.json")
    assert json.loads((folder / "adapter_config.json").read_text()).keys() == {
        "peft_type",
        "r",
        "lora_alpha",
        "target_modules",
        "task_type",
    }
    (folder / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(AdapterMismatch, match="not a LoRA"):
        copy_adapter_config(folder / "adapter_config.json")
