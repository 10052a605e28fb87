"""The model card: its metadata in the Hub's format, its tables and its usage code."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from infra.loopback.http_faults import HttpFaultProxy
from infra.loopback.hub import LoopbackHub
from jobs.llm.model_card import License, model_card, read_license, usage_snippets
from schema.job import ArtifactFile, EarlierModel, EvalMetrics, Gate, GateCheck
from schema.provenance import (
    ArtifactRecord,
    BaseModelRecord,
    CodeRecord,
    CostRecord,
    DatasetRecord,
    MachineRecord,
    RunRecord,
    SplitRecord,
    TimeRecord,
)
from schema.training import TRAINING_CONFIG
from schema.training.llm_fidelity import Fidelity
from schema.types import ArtifactKind
from tests.jobs.hub_fixture import hub, hub_proxy

__all__ = ["hub", "hub_proxy"]
NOW = datetime(2026, 11, 21, tzinfo=UTC)
REPO = "ada/tuned"


def make_artifact_record(kind: ArtifactKind, name: str, *, fidelity: Fidelity | None = None) -> ArtifactRecord:
    """An artifact; a name with a suffix is a single file."""
    key = f"{kind}/job-1/attempt-1/" + (name if "." in name else "")
    files = (ArtifactFile(path="", size_bytes=9, sha256="0" * 64),)
    return ArtifactRecord(
        name=name.partition(".")[0], kind=kind, key=key, size_bytes=550_000_000, files=files, fidelity=fidelity and fidelity.model_dump()
    )


def make_record(*artifacts: ArtifactRecord, config: dict[str, Any] | None = None, **changes: Any) -> RunRecord:
    training_config = TRAINING_CONFIG.validate_python({"base_model_id": "google/gemma-3-270m", **(config or {})})
    parts: dict[str, Any] = {
        "job_id": "job-1",
        "job_name": "a job",
        "attempt": 1,
        "training_config": training_config.model_dump(mode="json"),
        "seed": 42,
        "dataset": DatasetRecord(
            processed_dataset_id="d-1",
            name="docs | v2",
            dataset_type="messages",
            digest="sha256:abc",
            splits={"train": SplitRecord(rows=24, sha256="0"), "eval": SplitRecord(rows=5, sha256="1")},
        ),
        "train_tokens": 700,
        "base_model": BaseModelRecord(model_id=training_config.base_model_id, revision="f" * 40),
        "code": CodeRecord(tunesmith_version="0.2.0"),
        "packages": {"torch": "2.13.0", "transformers": "5.23.0"},
        "machine": MachineRecord(platform="Linux", python="3.11", cpu="a CPU", cpu_count=2, memory_bytes=1),
        "time": TimeRecord(started_at=NOW, finished_at=NOW, total_s=90.0, train_runtime_s=12.5),
        "cost": CostRecord(),
        "base_metrics": EvalMetrics(eval_loss=4.0, perplexity=54.6, content_perplexity=9.5, eval_rows=5, eval_tokens=77),
        "metrics": EvalMetrics(
            eval_loss=3.0,
            perplexity=20.1,
            content_perplexity=8.5,
            eval_rows=5,
            eval_tokens=77,
            values={"exact_match": 0.4, "bleu": None},
        ),
        "artifacts": artifacts or (make_artifact_record("adapter", "adapter"),),
    }
    return RunRecord(**(parts | changes))


def render_card(record: RunRecord, base_license: License | None = None) -> ModelCard:
    return ModelCard(model_card(record, REPO, base_license or License("gemma", files=("GEMMA_TERMS.html", "NOTICE"))))


def test_metadata_follows_hub_format() -> None:
    data = render_card(
        make_record(
            make_artifact_record("adapter", "adapter"),
            make_artifact_record("merged", "merged"),
            make_artifact_record("gguf", "m-q8_0.gguf"),
        )
    ).data.to_dict()
    results = data.pop("model-index")[0]["results"]
    assert data == {
        "base_model": "google/gemma-3-270m",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "license": "gemma",
        "pipeline_tag": "text-generation",
        "tags": ["tunesmith", "sft", "lora", "gguf"],
    }
    metrics = {metric["type"]: metric["value"] for result in results for metric in result["metrics"]}
    assert metrics == {"loss": 3.0, "perplexity": 20.1, "content_perplexity": 8.5, "exact_match": 0.4}  # unknown values are left out
    assert results[0]["dataset"] == {"name": "docs | v2", "type": "d-1", "split": "eval", "revision": "sha256:abc"}


@pytest.mark.parametrize(
    ("kinds", "library", "relation"),
    [
        (["adapter"], "peft", "adapter"),
        (["gguf"], "gguf", "finetune"),
        (["adapter", "gguf"], "peft", "finetune"),
        (["merged"], "transformers", "finetune"),
    ],
)
def test_library_name_matches_artifacts(kinds: list[ArtifactKind], library: str, relation: str) -> None:
    data = render_card(make_record(*(make_artifact_record(kind, "m.gguf" if kind == "gguf" else kind) for kind in kinds))).data
    assert (data.get("library_name"), data.get("base_model_relation")) == (library, relation)


def test_base_and_tuned_metrics_are_shown_side_by_side() -> None:
    text = render_card(make_record()).text
    assert "| perplexity | 54.6 | 20.1 |" in text
    assert "| perplexity without end-of-turn tokens | 9.5 | 8.5 |" in text
    assert "| exact_match | unknown | 0.4 |" in text
    assert "bleu" not in text
    assert "5 rows, 77 labeled tokens" in text


def test_fidelity_of_each_file_is_shown_and_removed_tuning_is_flagged() -> None:
    good = Fidelity(compared_tokens=9, argmax_agreement=1.0, mean_kl_to_merged=0.0004, mean_kl_to_base=0.9, perplexity=20.2)
    lost = Fidelity(compared_tokens=9, argmax_agreement=0.5, mean_kl_to_merged=0.8, closer_to_base=True, advice="take q8_0")
    text = render_card(
        make_record(
            make_artifact_record("gguf", "m-q8_0.gguf", fidelity=good), make_artifact_record("gguf", "m-q4_k_m.gguf", fidelity=lost)
        )
    ).text
    assert "| `m-q8_0.gguf` | 100.0 % | 0.0004 | 0.9 | 20.2 | unknown | unknown |" in text
    assert "**Quantization removed the tuning from this file:** `m-q4_k_m.gguf`: take q8_0" in text
    assert text.count("removed the tuning") == 1


def test_gate_result_is_shown() -> None:
    checks = (GateCheck(metric="perplexity", value=20.1, at_most=49.1, base=54.6, passed=True),)
    assert "| perplexity | 20.1 | at most 49.1 | 54.6 | yes |" in render_card(make_record(gate=Gate(passed=True, checks=checks))).text
    assert "did not pass" in render_card(make_record(gate=Gate(passed=False, checks=checks))).text
    assert "promotion gate" not in render_card(make_record()).text


def test_unknown_values_are_not_shown() -> None:
    text = render_card(
        make_record(metrics=None, base_metrics=None, code=CodeRecord(), base_model=BaseModelRecord(model_id="o/b"), train_tokens=None),
        License(),
    ).text
    assert "no held-out rows" in text
    assert "None" not in text
    assert "tokens seen" not in text
    assert "GPU energy" not in text
    assert "do not name its license" in text
    assert "license" not in render_card(make_record(), License()).data.to_dict()


def test_training_is_described_and_names_are_escaped() -> None:
    text = render_card(make_record(cost=CostRecord(gpu_energy_wh=2.0))).text
    assert "| dataset | docs \\| v2 (messages) |" in text
    assert "| rows | 24 train, 5 eval |" in text
    assert "| lora_rank | 16 |" in text
    assert "| GPU energy | 2.0 Wh |" in text
    assert "Tunesmith 0.2.0" in text
    assert "lora_rank" not in render_card(make_record(make_artifact_record("merged", "merged"), config={"method": "Full"})).text


def test_license_of_the_base_is_included(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gemma3_text"}')
    (tmp_path / "GEMMA_TERMS.html").write_text("terms")
    (tmp_path / "NOTICE").write_text("notice")
    gemma = read_license(tmp_path)
    text = render_card(make_record(), gemma).text
    assert gemma == License("gemma", files=("GEMMA_TERMS.html", "NOTICE"))
    assert "Gemma Terms of Use" in text
    assert "`GEMMA_TERMS.html`, `NOTICE`" in text

    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: lab\nlicense_link: https://lab.example/l\n---\n")
    other = read_license(tmp_path)
    assert (other.hub_id, other.name) == ("other", "lab")  # the base model's card takes precedence
    assert "[lab](https://lab.example/l)" in render_card(make_record(), other).text

    (tmp_path / "README.md").unlink()
    (tmp_path / "GEMMA_TERMS.html").unlink()
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert read_license(tmp_path) == License(files=("NOTICE",))


def test_usage_matches_vision_and_reward_models() -> None:
    def render_usage(**config: Any) -> str:
        record = make_record(make_artifact_record("merged", "merged"), make_artifact_record("adapter", "adapter"), config=config)
        return render_card(record).data.get("pipeline_tag") + "\n" + "\n".join(snippet.text for snippet in usage_snippets(record, REPO))

    assert render_usage(modality="vision").startswith("image-text-to-text")
    assert "AutoModelForImageTextToText" in render_usage(modality="vision")
    assert render_usage(trainer_type="reward").startswith("text-classification")
    assert "num_labels=1" in render_usage(trainer_type="reward")


def test_usage_names_gguf_files() -> None:
    record = make_record(
        make_artifact_record("gguf", "m-q8_0.gguf"),
        make_artifact_record("lora_gguf", "m-lora.gguf"),
    )
    text = render_card(record).text
    assert "llama-cli -hf ada/tuned -hff m-q8_0.gguf" in text
    assert "ollama run hf.co/ada/tuned:m-q8_0.gguf" in text
    assert "--lora m-lora.gguf" in text


def test_usage_code_of_the_card_runs(
    hub: LoopbackHub, hub_proxy: HttpFaultProxy, base: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    hub.add_repository("tiny/gemma", {path.name: path.read_bytes() for path in base.iterdir()})
    hub.add_repository(REPO, {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()})
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    record = make_record(
        make_artifact_record("adapter", "adapter"), make_artifact_record("merged", "merged"), config={"base_model_id": "tiny/gemma"}
    )
    with_transformers, with_peft = usage_snippets(record, REPO)
    printed: list[Any] = []
    exec(with_transformers.text.replace("max_new_tokens=128", "max_new_tokens=2"), {"print": printed.append})
    assert printed[0][0]["generated_text"][-1]["role"] == "assistant"
    names: dict[str, Any] = {}
    exec(with_peft.text, names)
    assert [name for name, _ in names["model"].named_parameters() if "lora_" in name]


def test_card_names_the_earlier_job_and_every_mixed_dataset() -> None:
    first = make_record().dataset
    mixed = tuple(first.model_copy(update={"name": name, "weight": weight}) for name, weight in (("docs", 0.7), ("chats", 0.3)))
    earlier = EarlierModel(
        job_id="job-0", trainer_type="sft", modality="text", kind="adapter", key="a/", digest="sha256:0", in_adapter=True
    )
    text = render_card(make_record(mixed_datasets=mixed, earlier_model=earlier)).text
    assert "the model of job job-0 (sft)" in text
    assert "docs (messages, weight 0.7)" in text
    assert "chats (messages, weight 0.3)" in text
    assert ", weight" not in render_card(make_record()).text
