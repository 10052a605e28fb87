"""From a trained model to files that were heard in llama.cpp."""

import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from jobs.context import JobContext
from jobs.errors import JobFailed, Stopped
from jobs.exporters import EXPORTERS, export_all, kinds
from jobs.exporters.bench import Bench
from jobs.exporters.examiner import HARD_TEXTS, Candidate, Examiner, advice_on, erases_tuning, refuse_unfit
from jobs.exporters.folders import precision
from jobs.exporters.gguf import stage
from jobs.exporters.merge import refuse_unlike
from jobs.exporters.speech import MOST_POSITIONS, MOST_TOKENS, passages_of, sample_of
from jobs.exporters.streaming import stream
from jobs.llama import apart, llama_cpp_available
from jobs.llama.evaluate import Answer
from jobs.llama.fidelity import TIE_NATS, Comparison, Passage, compare, log_softmax, targets_of
from jobs.publish import sha256_of
from jobs.trained import Probe, TrainedModel
from schema.events import Decided, PhaseChanged, Warned
from schema.job import Artifact
from schema.spec import manifest_key
from schema.training import SftConfig
from storage import ObjectStore
from tests.exports.conftest import Record, a_job_context, read_json

MakeContext = Callable[..., JobContext]
Exported = tuple[dict[str, Artifact], JobContext, Record]


@pytest.fixture(scope="module")
def exported(adapter: TrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Everything that a LoRA job can hand back, made once."""
    record = Record()
    quantizations = ["none", "bf16", "f16", "f32", "q8_0", "q4_k_m"]
    root = tmp_path_factory.mktemp("job")
    wanted = {"format": ["adapter", "merged"], "include_lora_gguf": True, "include_gguf": True, "gguf_quantization": quantizations}
    context = a_job_context(root, record, **wanted)
    return {artifact.name: artifact for artifact in export_all(adapter, context)}, context, record


def test_llama_cpp_is_installed() -> None:
    assert llama_cpp_available()


def test_every_exporter_can_be_called() -> None:
    from importlib import import_module

    for place in EXPORTERS.values():
        module, _, function = place.partition(":")
        assert callable(getattr(import_module(module), function))


@pytest.mark.parametrize(
    ("method", "export_config", "expected"),
    [
        ("LoRA", {}, ("adapter",)),
        ("LoRA", {"format": "merged"}, ("merged",)),
        ("LoRA", {"include_gguf": True}, ("adapter", "gguf")),
        ("LoRA", {"format": "merged", "include_gguf": True}, ("merged", "gguf")),
        ("Full", {}, ("merged",)),
        ("LoRA", {"format": ["merged", "adapter"], "include_lora_gguf": True}, ("merged", "adapter", "lora_gguf")),
        ("Full", {"include_gguf": True}, ("merged", "gguf")),
    ],
)
def test_a_job_makes_what_was_asked_for(method: str, export_config: dict[str, Any], expected: tuple[str, ...]) -> None:
    config = SftConfig.model_validate({"base_model_id": "a/b", "method": method, "export_config": export_config})
    assert kinds(config) == expected


def test_everything_lies_where_it_is_said_to_lie(exported: Exported, tmp_path: Path) -> None:
    artifacts, context, _ = exported
    store = context.stores.models
    assert store.stat(manifest_key("job-1")) is None  # publishing is the service's
    ggufs = ["gguf-none", "gguf-bf16", "gguf-f16", "gguf-f32", "gguf-q8_0", "gguf-q4_k_m", "lora-gguf", "gguf-howto"]
    assert list(artifacts) == ["adapter", "merged", *ggufs]
    assert artifacts["gguf-none"].key == "gguf_models/job-1/attempt-1/gemma-3-270m-none.gguf"
    for artifact in artifacts.values():
        assert artifact.uri == f"{store.url}/{artifact.key}"
        for file in artifact.files:
            path = store.download(artifact.key + file.path, tmp_path / "file")
            assert (path.stat().st_size, sha256_of(path)) == (file.size_bytes, file.sha256)


def test_the_work_leaves_nothing_behind_and_says_where_it_is(exported: Exported) -> None:
    _, context, record = exported
    phases = [event.phase for event in record.events if isinstance(event, PhaseChanged)]
    assert phases == ["verifying", "merging", "converting", "verifying", "converting", "verifying", "uploading"]
    assert not list(context.workdir.iterdir())


def test_the_merged_model_speaks_like_base_and_adapter(exported: Exported, adapter: TrainedModel, tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    artifacts, context, _ = exported
    folder = download(context.stores.models, artifacts["merged"], tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(adapter.base_folder, dtype=torch.float32)
    ids = torch.tensor([adapter.probes[0].input_ids])
    with torch.inference_mode():
        expected = PeftModel.from_pretrained(base, str(adapter.folder))(input_ids=ids).logits
        assert (merged(input_ids=ids).logits - expected).abs().max() < 0.05  # the weights are rounded to bfloat16
    fidelity = artifacts["merged"].fidelity
    assert fidelity is not None
    assert fidelity.mean_kl_to_merged < 1e-4
    assert fidelity.mean_kl_to_base is not None
    assert fidelity.mean_kl_to_base > 0.01  # the tuning is there
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert merged.generation_config.eos_token_id == [1, tokenizer.convert_tokens_to_ids("<end_of_turn>")]
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(adapter.folder).chat_template
    assert str(adapter.base_folder) not in "".join(path.read_text() for path in folder.glob("*.json"))


@pytest.mark.parametrize("quantization", ["none", "bf16", "f16", "f32"])
def test_a_file_that_keeps_the_weights_agrees_with_the_model(exported: Exported, quantization: str) -> None:
    fidelity = exported[0][f"gguf-{quantization}"].fidelity
    assert fidelity is not None
    assert fidelity.argmax_agreement == 1.0
    assert fidelity.mean_kl_to_merged < 1e-4
    assert fidelity.compared_tokens > 100
    assert fidelity.sample_text
    assert fidelity.sample_prompt.startswith("<bos><start_of_turn>user\n")


def test_coarser_files_are_further_from_the_model(exported: Exported) -> None:
    f16, q8, q4 = (exported[0][f"gguf-{name}"] for name in ("f16", "q8_0", "q4_k_m"))
    assert f16.size_bytes > q8.size_bytes > q4.size_bytes
    assert f16.fidelity
    assert q8.fidelity
    assert q4.fidelity
    assert f16.fidelity.mean_kl_to_merged < q8.fidelity.mean_kl_to_merged < q4.fidelity.mean_kl_to_merged
    assert q8.fidelity.argmax_agreement > 0.95
    assert not q8.fidelity.erased_tuning


def test_perplexity_is_told_beside_that_of_the_model_and_of_its_base(exported: Exported, adapter: TrainedModel) -> None:
    import math

    import torch
    from transformers import AutoModelForCausalLM

    losses: list[float] = []
    base = AutoModelForCausalLM.from_pretrained(adapter.base_folder, dtype=torch.float32)
    for probe in adapter.probes:
        ids = torch.tensor([probe.input_ids])
        with torch.inference_mode():
            log_probs = base(input_ids=ids).logits[0].log_softmax(-1)
        losses += [-float(log_probs[i - 1, probe.input_ids[i]]) for i in range(probe.prompt_tokens, len(probe.input_ids))]
    f16, q4, merged = (exported[0][name].fidelity for name in ("gguf-f16", "gguf-q4_k_m", "merged"))
    assert f16
    assert q4
    assert merged
    assert f16.labelled_tokens == q4.labelled_tokens == merged.labelled_tokens == len(losses)
    assert f16.perplexity_base == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    assert f16.perplexity == pytest.approx(f16.perplexity_merged, rel=1e-2)
    assert f16.perplexity_merged == q4.perplexity_merged == pytest.approx(merged.perplexity, rel=1e-6)
    assert f16.perplexity_merged != pytest.approx(f16.perplexity_base, rel=1e-2)
    assert q4.perplexity != pytest.approx(q4.perplexity_merged, rel=1e-3)


def test_an_importance_matrix_of_the_training_rows_is_used_where_it_helps(exported: Exported) -> None:
    weighed = {name for name, artifact in exported[0].items() if artifact.fidelity and artifact.fidelity.imatrix}
    assert weighed == {"gguf-q4_k_m"}
    (decision,) = [event for event in exported[2].events if isinstance(event, Decided) and event.what == "gguf_imatrix"]
    assert (decision.value, decision.why) == ("true", "q4_k_m gain by it")


def test_the_adapter_alone_speaks_like_the_model_beside_its_base(exported: Exported) -> None:
    lora = exported[0]["lora-gguf"]
    assert lora.kind == "lora_gguf"
    assert lora.key == "gguf_models/job-1/attempt-1/gemma-3-270m-lora-f16.gguf"
    assert lora.size_bytes < exported[0]["gguf-f16"].size_bytes / 5
    assert lora.fidelity
    assert lora.fidelity.argmax_agreement == 1.0
    assert lora.fidelity.mean_kl_to_merged < 1e-4
    assert lora.fidelity.mean_kl_to_base
    assert lora.fidelity.mean_kl_to_base > 0.01
    assert not lora.fidelity.advice


def test_beside_the_files_lies_how_to_run_them_and_what_was_measured(exported: Exported, tmp_path: Path) -> None:
    artifacts, context, _ = exported
    folder = download(context.stores.models, artifacts["gguf-howto"], tmp_path)
    heard = [artifact for artifact in artifacts.values() if artifact.kind in ("gguf", "lora_gguf") and artifact.fidelity]
    told = read_json(folder / "fidelity.json")
    assert told == {artifact.name: artifact.fidelity.model_dump(mode="json") for artifact in heard if artifact.fidelity}
    for artifact in heard:
        stem = artifact.key.rpartition("/")[2].removesuffix(".gguf")
        assert f"{stem}.gguf" in (folder / f"{stem}.Modelfile").read_text()
        assert f" {stem}.gguf" in (folder / f"{stem}.sh").read_text()
    assert read_json(download(context.stores.models, artifacts["merged"], tmp_path / "merged") / "fidelity.json")["merged"]


def test_the_command_line_beside_a_file_works_as_it_stands(exported: Exported, tmp_path: Path) -> None:
    import subprocess

    from jobs.llama import program

    artifacts, context, _ = exported
    folder = download(context.stores.models, artifacts["gguf-howto"], tmp_path)
    context.stores.models.download(artifacts["gguf-q8_0"].key, tmp_path / "gemma-3-270m-q8_0.gguf")
    tool = program("llama-completion")
    assert tool
    ran = subprocess.run(
        ["sh", folder / "gemma-3-270m-q8_0.sh"], cwd=tmp_path, env={"PATH": f"{tool.parent}:/usr/bin:/bin"}, capture_output=True
    )
    assert ran.returncode == 0
    assert b"model\n" in ran.stdout


def test_a_gguf_file_knows_its_chat_template_and_keeps_turn_tokens_whole(exported: Exported, adapter: TrainedModel, tmp_path: Path) -> None:
    from gguf import GGUFReader, TokenType
    from transformers import AutoTokenizer

    artifacts, context, _ = exported
    reader = GGUFReader(context.stores.models.download(artifacts["gguf-f16"].key, tmp_path / "f16.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(adapter.folder)
    types = reader.fields["tokenizer.ggml.token_type"].contents()
    for mark in ("<start_of_turn>", "<end_of_turn>"):
        assert types[tokenizer.convert_tokens_to_ids(mark)] == TokenType.CONTROL
    assert reader.fields["tokenizer.chat_template"].contents() == tokenizer.chat_template
    assert reader.fields["general.name"].contents() == "gemma-3-270m"


def test_an_adapter_is_handed_back_alone(adapter: TrainedModel, a_context: MakeContext, tmp_path: Path) -> None:
    context = a_context()
    (artifact,) = export_all(adapter, context)
    folder = download(context.stores.models, artifact, tmp_path / "got")
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert read_json(folder / "adapter_config.json")["base_model_name_or_path"] == "google/gemma-3-270m"
    assert artifact.key == "trained_adapters/job-1/attempt-1/"


def test_gguf_beside_an_adapter_publishes_no_merged_model(adapter: TrainedModel, a_context: MakeContext) -> None:
    context = a_context(include_gguf=True)
    assert [artifact.name for artifact in export_all(adapter, context)] == ["adapter", "gguf-q8_0", "gguf-howto"]
    assert not list(context.stores.models.walk("merged_models/"))


def test_a_fully_trained_model_needs_no_merge(full: TrainedModel, a_context: MakeContext, tmp_path: Path) -> None:
    context = a_context("Full", include_gguf=True, gguf_quantization="f16")
    merged, f16, _ = export_all(full, context)
    folder = download(context.stores.models, merged, tmp_path / "got")
    assert (folder / "model.safetensors").read_bytes() == (full.folder / "model.safetensors").read_bytes()
    assert f16.fidelity
    assert f16.fidelity.argmax_agreement == 1.0
    assert f16.fidelity.mean_kl_to_base
    assert f16.fidelity.mean_kl_to_base > 0.01


def test_a_merged_model_comes_in_the_precision_asked_for(adapter: TrainedModel, a_context: MakeContext, tmp_path: Path) -> None:
    context = a_context(format="merged", merged_dtype="fp16")
    (merged,) = export_all(adapter, context)
    folder = download(context.stores.models, merged, tmp_path / "got")
    assert precision(folder) == "f16"
    assert read_json(folder / "config.json")["dtype"] == "float16"
    assert merged.fidelity
    assert merged.fidelity.argmax_agreement > 0.99


def test_a_fully_trained_model_is_rounded_to_its_bases_precision(full: TrainedModel, a_context: MakeContext, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    wide = tmp_path / "wide"
    stream(full.folder, wide, torch.float32)
    for path in full.folder.glob("*.json"):
        (wide / path.name).write_bytes(path.read_bytes())
    context = a_context("Full")
    (merged,) = export_all(replace(full, folder=wide), context)
    folder = download(context.stores.models, merged, tmp_path / "got")
    assert precision(folder) == "bf16"
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    assert merged.fidelity  # with the model before it was rounded
    assert merged.fidelity.mean_kl_to_merged < 1e-4


def test_weights_too_large_for_float16_are_refused_with_advice(full: TrainedModel, a_context: MakeContext, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(full.folder, tmp_path / "large"))
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = 1e5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(JobFailed, match=r"model\.norm\.weight has numbers that are too large for f16") as caught:
        export_all(replace(full, folder=folder), a_context("Full", merged_dtype="fp16"))
    assert "bf16 or fp32" in caught.value.failure.hint


def test_a_model_that_llama_cpp_computes_differently_is_refused(full: TrainedModel, a_context: MakeContext, tmp_path: Path) -> None:
    # llama.cpp takes every sixth layer of a Gemma 3 to see everything, whatever the config says.
    import json
    import shutil

    folder = Path(shutil.copytree(full.folder, tmp_path / "unusual"))
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps(config | {"layer_types": ["full_attention", "sliding_attention"] * 3}))
    context = a_context("Full", include_gguf=True, gguf_quantization="f32")
    with pytest.raises(JobFailed, match="does not speak like the trained model") as caught:
        export_all(replace(full, folder=folder), context)
    assert caught.value.failure.code == "export_failed"
    assert not list(context.stores.models.walk(""))


def test_a_corrupt_file_is_refused(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + bytes(200))
    with pytest.raises(JobFailed, match=r"broken\.gguf does not work in llama\.cpp") as caught:
        Examiner(bench).examine(Candidate(path, "f16"))
    assert caught.value.failure.code == "export_failed"


def test_a_file_is_byte_by_byte_what_llama_cpps_own_converter_writes(exported: Exported, adapter: TrainedModel, tmp_path: Path) -> None:
    from jobs.llama import converter

    artifacts, context, _ = exported
    whole = download(context.stores.models, artifacts["merged"], tmp_path / "merged")
    staging = stage(whole, whole, [adapter.base_folder], tmp_path / "staging")
    options = ["--outtype", "bf16", "--model-name", "gemma-3-270m"]
    apart.run("convert", [sys.executable, str(converter()), str(staging), *options, "--outfile", str(tmp_path / "plain.gguf")])
    assert sha256_of(tmp_path / "plain.gguf") == artifacts["gguf-bf16"].sha256


def test_a_crash_of_llama_cpp_is_an_ending_like_another() -> None:
    crash = "import os, signal; print('last words'); import sys; sys.stdout.flush(); os.kill(os.getpid(), signal.SIGSEGV)"
    with pytest.raises(apart.ProgramFailed, match="quantize was killed by SIGSEGV: last words"):
        apart.run("quantize", [sys.executable, "-c", crash])


def test_a_cancel_takes_the_program_with_it() -> None:
    import psutil

    before = set(psutil.Process().children())
    with alarm_raises(Stopped("cancel"), after_s=0.3), pytest.raises(Stopped):
        apart.run("convert", [sys.executable, "-c", "import time; time.sleep(60)"])
    assert set(psutil.Process().children()) <= before


def test_diverged_weights_are_refused(adapter: TrainedModel, a_context: MakeContext, tmp_path: Path) -> None:
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(adapter.folder, tmp_path / "diverged"))
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name: torch.full_like(tensor, float("nan")) for name, tensor in weights.items()}, folder / "adapter_model.safetensors")
    diverged = replace(adapter, folder=folder)
    for export_config in ({"format": "adapter"}, {"format": "merged"}):
        with pytest.raises(JobFailed, match="not finite") as caught:
            export_all(diverged, a_context(**export_config))
        assert "learning_rate" in caught.value.failure.hint


def test_an_adapter_without_probes_is_verified_all_the_same(adapter: TrainedModel, a_context: MakeContext) -> None:
    _, artifact, _ = export_all(replace(adapter, probes=()), a_context(include_gguf=True))
    assert artifact.fidelity
    assert artifact.fidelity.sample_prompt == "Once upon a time"
    assert artifact.fidelity.compared_tokens > 50


def test_runs_of_spaces_are_among_what_is_compared() -> None:
    assert any(" " * 8 in text for text in HARD_TEXTS)


def test_without_the_mend_turn_tokens_would_fall_apart(bench: Bench, adapter: TrainedModel, tmp_path: Path) -> None:
    staging = stage(bench.whole.folder, bench.whole.folder, [adapter.base_folder], tmp_path / "staging")
    listed = read_json(staging / "tokenizer_config.json")["added_tokens_decoder"]
    marks = {token["content"]: token["special"] for token in listed.values()}
    assert marks["<start_of_turn>"]
    assert marks["<end_of_turn>"]
    assert "added_tokens_decoder" not in read_json(bench.whole.folder / "tokenizer_config.json")


def test_a_file_that_splits_texts_differently_is_refused() -> None:
    with pytest.raises(JobFailed, match="splits 1 of 2 texts"):
        refuse_unfit(a_candidate("q8_0"), an_answer(token_ids=[[1, 2], [3]]), [[1, 2], [4]])


def test_a_file_that_keeps_the_weights_must_speak_alike_and_a_quantized_one_need_not() -> None:
    answer = an_answer(argmax_agreement=0.5, mean_kl_to_trained=1.0)
    refuse_unfit(a_candidate("q4_k_m"), answer, [])
    for quantization in ("none", "f32", "f16", "bf16"):
        with pytest.raises(JobFailed, match=r"agree on 50\.0% of 10 tokens"):
            refuse_unfit(a_candidate(quantization), answer, [])


def test_rounding_that_undid_the_training_is_noticed() -> None:
    assert erases_tuning(a_comparison(mean_kl_to_trained=0.84, mean_kl_to_base=0.16))
    assert not erases_tuning(a_comparison(mean_kl_to_trained=0.16, mean_kl_to_base=0.84))
    assert not erases_tuning(a_comparison(mean_kl_to_trained=0.001, mean_kl_to_base=0.0))  # training that changed nothing
    assert not erases_tuning(a_comparison(mean_kl_to_trained=0.84, mean_kl_to_base=None))


def test_the_user_is_warned_of_erased_tuning(bench: Bench, record: Record, tmp_path: Path) -> None:
    # The base's own file stands for a quantization that rounded every change away.
    path = tmp_path / "base.gguf"
    trained = bench.trained
    staging = stage(trained.base_folder, trained.base_folder, [trained.base_folder], tmp_path / "staging")
    apart.convert(staging, path, precision="bf16", name="base")
    fidelity = Examiner(bench).examine(Candidate(path, "q2_k"))
    assert fidelity.erased_tuning
    (warning,) = [event for event in record.events if isinstance(event, Warned)]
    assert warning.code == "erased_tuning"
    assert "q8_0 or f16" in warning.message


def test_a_file_that_cannot_hold_what_was_trained_is_flagged_and_not_hidden() -> None:
    lacking = a_candidate("f16", base=Path("base.gguf"), lacks="the embeddings of 2 tokens that were trained as well")
    far = an_answer(argmax_agreement=0.9, mean_kl_to_trained=0.3, mean_kl_to_base=0.1)
    refuse_unfit(lacking, far, [])
    advice = advice_on(lacking, far.comparison)
    assert "lacks the embeddings of 2 tokens" in advice
    assert "nearer to the base; use include_gguf" in advice
    assert not advice_on(lacking, an_answer().comparison)  # the rows hardly moved
    with pytest.raises(JobFailed, match="does not speak like"):
        refuse_unfit(a_candidate("f16", base=Path("base.gguf")), far, [])


@pytest.mark.parametrize(
    ("positions", "agreement", "kl", "outcome"),
    [
        (124, 0.99, 0.0001, "silence"),
        (124, 0.96, 0.008, "warned"),  # five tokens: so few can be chance
        (2000, 0.96, 0.008, "warned"),
        (2000, 0.95, 0.008, "refused"),
        (124, 0.90, 0.008, "refused"),
        (124, 1.0, 0.03, "refused"),
    ],
)
def test_a_merged_model_may_lose_to_rounding_but_not_speak_otherwise(
    a_context: MakeContext, record: Record, positions: int, agreement: float, kl: float, outcome: str
) -> None:
    found = a_comparison(positions=positions, argmax_agreement=agreement, mean_kl_to_trained=kl)
    if outcome == "refused":
        with pytest.raises(JobFailed, match="does not speak like base and adapter"):
            refuse_unlike(found, "base and adapter together", a_context())
        return
    refuse_unlike(found, "base and adapter together", a_context())
    said = [event.message for event in record.events if isinstance(event, Warned)]
    assert len(said) == (outcome == "warned")
    assert all("merged_dtype 'fp32'" in message for message in said)


def test_near_ties_count_as_agreement() -> None:
    import numpy as np

    trained = log_softmax(np.array([[2.0, 2.0 - TIE_NATS / 2, 0.0], [2.0, 1.0, 0.0]], dtype=np.float32))
    other = np.array([[1.0, 2.0, 0.0], [1.0, 2.0, 0.0]], dtype=np.float32)
    assert compare(iter(other), trained).argmax_agreement == 0.5


def test_a_model_is_at_no_distance_from_itself() -> None:
    import numpy as np

    logits = np.random.default_rng(1).normal(size=(5, 1000), scale=5).astype(np.float32)
    found = compare(iter(logits), log_softmax(logits), log_softmax(logits[::-1]))
    assert (found.positions, found.argmax_agreement, found.mean_kl_to_trained) == (5, 1.0, pytest.approx(0, abs=1e-6))
    assert found.mean_kl_to_base
    assert found.mean_kl_to_base > 1


def test_perplexity_counts_the_tokens_that_a_row_wants_and_no_others() -> None:
    import math

    import numpy as np

    passages = [Passage(ids=(7, 1, 2, 0), compared=3, answer_from=2), Passage(ids=(0, 0), compared=2)]
    assert targets_of(passages) == [2, 0, None, None, None]
    rows = np.log(np.array([[0.2, 0.3, 0.5], [0.25, 0.25, 0.5], [1 / 3] * 3, [1 / 3] * 3, [1 / 3] * 3], dtype=np.float32))
    found = compare(iter(rows), rows, rows[:, ::-1], targets_of(passages))
    assert found.labelled == 2
    assert found.perplexity == pytest.approx(math.exp(-(math.log(0.5) + math.log(0.25)) / 2))
    assert found.perplexity_trained == pytest.approx(found.perplexity)
    assert found.perplexity_base == pytest.approx(math.exp(-(math.log(0.2) + math.log(0.5)) / 2))


@pytest.mark.parametrize(("rows", "message"), [(4, "4 positions"), (6, "more positions"), (5, "not finite")])
def test_what_cannot_be_compared_is_an_error(rows: int, message: str) -> None:
    import numpy as np

    logits = np.zeros((rows, 10), dtype=np.float32)
    if rows == 5:
        logits[3, 3] = np.nan
    with pytest.raises(ValueError, match=message):
        compare(iter(logits), log_softmax(np.zeros((5, 10), dtype=np.float32)))


def test_long_rows_are_cut_around_the_start_of_the_answer() -> None:
    probe = Probe(prompt_text="", input_ids=tuple(range(1000)), prompt_tokens=600)
    (passage,) = passages_of([probe], tokenizer=None)  # pyright: ignore[reportArgumentType]  # not asked
    assert len(passage.ids) == MOST_TOKENS
    assert passage.ids[0] == 0
    assert {599, 600, 601} <= set(passage.ids)
    assert passage.answer_from
    assert passage.ids[passage.answer_from] == 600  # the first that the row wants to be said
    assert passage.compared <= MOST_POSITIONS


def test_the_sample_continues_the_shortest_prompt() -> None:
    probes = [Probe("a long one", tuple(range(20)), 10), Probe("short", tuple(range(5)), 3)]
    assert sample_of(probes, tokenizer=None) == ("short", (0, 1, 2))  # pyright: ignore[reportArgumentType]  # not asked


@pytest.fixture
def bench(adapter: TrainedModel, a_context: MakeContext) -> Bench:
    return Bench(adapter, a_context(include_gguf=True))


def a_candidate(quantization: Any, **facts: Any) -> Candidate:
    return Candidate(Path("x.gguf"), quantization, **facts)


def a_comparison(**changes: Any) -> Comparison:
    defaults = {"positions": 10, "argmax_agreement": 1.0, "mean_kl_to_trained": 0.0, "mean_kl_to_base": 1.0, "max_difference": 0.0}
    return Comparison.model_validate(defaults | changes)


def an_answer(token_ids: list[list[int]] | None = None, **changes: Any) -> Answer:
    return Answer(token_ids=token_ids or [], comparison=a_comparison(**changes), sampled=1, sample_text="x")


def download(store: ObjectStore, artifact: Artifact, target: Path) -> Path:
    for file in artifact.files:
        store.download(artifact.key + file.path, target / file.path)
    return target


class alarm_raises:  # noqa: N801  # reads as a statement
    """Raises an error in the main thread after a while, as a signal's handler does."""

    def __init__(self, error: BaseException, after_s: float) -> None:
        self.error, self.after_s = error, after_s

    def __enter__(self) -> None:
        def ring(number: int, frame: FrameType | None) -> None:
            raise self.error

        self.before = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, self.after_s)

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self.before)
