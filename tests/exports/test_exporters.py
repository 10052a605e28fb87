"""Exports of a trained model, each verified in llama.cpp."""

import re
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from jobs.llm.exporters import EXPORTERS, export_all, list_requested_kinds
from jobs.llm.exporters.adapter import export as export_adapter
from jobs.llm.exporters.log_probs import MAX_PASSAGE_TOKENS, MAX_POSITIONS, GreedyAnswer, make_passages, select_sample_prompt
from jobs.llm.exporters.merge import RoundsTooMuch, check_merge_fidelity, make_precision_hint
from jobs.llm.exporters.model_files import read_precision
from jobs.llm.exporters.staging import make_staging_folder
from jobs.llm.exporters.tensor_merge import merge_tensors
from jobs.llm.exporters.verify import TOKENIZER_EDGE_CASES, ExportedFile, GgufVerifier, check_fidelity, is_closer_to_base, make_advice
from jobs.llm.exporters.workspace import ExportWorkspace
from jobs.llm.llama_cpp import is_llama_cpp_available
from jobs.llm.llama_cpp.evaluate import EvalResponse
from jobs.llm.llama_cpp.fidelity import TIE_NATS, Comparison, Passage, compare, list_targets, log_softmax
from jobs.llm.llama_cpp.vocabulary import VocabularyReport
from jobs.llm.trained_model import HeldOutExample, TrainedModel
from jobs.runtime.context import JobContext
from jobs.runtime.errors import JobFailed, Stopped
from jobs.runtime.files import sha256_of
from jobs.runtime.subprocesses import SubprocessFailed, run_program
from schema.events import DecisionMade, PhaseChanged, WarningRaised
from schema.job import Artifact
from schema.spec import manifest_key
from schema.training import SftConfig
from storage import ObjectStore
from tests.exports.conftest import EventRecorder, fidelity_of, make_job_context, read_json

MakeContext = Callable[..., JobContext]
Exported = tuple[dict[str, Artifact], JobContext, EventRecorder]


@pytest.fixture(scope="module")
def exported(adapter: TrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Every artifact of a LoRA job, exported once."""
    record = EventRecorder()
    quantizations = ["none", "bf16", "f16", "f32", "q8_0", "q4_k_m"]
    root = tmp_path_factory.mktemp("job")
    export_config = {"format": ["adapter", "merged"], "include_lora_gguf": True, "include_gguf": True, "gguf_quantization": quantizations}
    context = make_job_context(root, record, **export_config)
    return {artifact.name: artifact for artifact in export_all(adapter, context)}, context, record


def test_llama_cpp_is_installed() -> None:
    assert is_llama_cpp_available()


def test_every_exporter_can_be_called() -> None:
    from pkgutil import resolve_name

    for name in EXPORTERS.values():
        assert callable(resolve_name(name))


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
def test_export_config_selects_artifact_kinds(method: str, export_config: dict[str, Any], expected: tuple[str, ...]) -> None:
    config = SftConfig.model_validate({"base_model_id": "a/b", "method": method, "export_config": export_config})
    assert list_requested_kinds(config) == expected


def test_artifacts_are_stored_under_their_keys(exported: Exported, tmp_path: Path) -> None:
    artifacts, context, _ = exported
    store = context.stores.models
    assert store.stat(manifest_key("job-1")) is None  # only the service writes the manifest
    ggufs = ["gguf-none", "gguf-bf16", "gguf-f16", "gguf-f32", "gguf-q8_0", "gguf-q4_k_m", "lora-gguf"]
    assert list(artifacts) == ["adapter", "merged", *ggufs]
    assert artifacts["gguf-none"].key == "gguf_models/job-1/attempt-1/gemma-3-270m-none.gguf"
    for artifact in artifacts.values():
        assert artifact.uri == f"{store.url}/{artifact.key}"
        for file in artifact.files:
            path = store.download(artifact.file_key(file), tmp_path / "file")
            assert (path.stat().st_size, sha256_of(path)) == (file.size_bytes, file.sha256)


def test_export_removes_work_files_and_reports_phases(exported: Exported) -> None:
    _, context, record = exported
    phases = [event.phase for event in record.events if isinstance(event, PhaseChanged)]
    assert phases == ["verifying", "merging", "converting", "verifying", "converting", "verifying", "uploading"]
    assert not list(context.workdir.iterdir())


def test_merged_model_matches_base_with_adapter(exported: Exported, adapter: TrainedModel, tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    artifacts, context, _ = exported
    folder = download_artifact(context.stores.models, artifacts["merged"], tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(adapter.base_folder, dtype=torch.float32)
    ids = torch.tensor([adapter.held_out_examples[0].input_ids])
    with torch.inference_mode():
        expected = PeftModel.from_pretrained(base, str(adapter.folder))(input_ids=ids).logits
        assert (merged(input_ids=ids).logits - expected).abs().max() < 0.05  # the weights are rounded to bfloat16
    fidelity = fidelity_of(artifacts["merged"])
    assert fidelity.mean_kl_to_merged < 1e-4
    assert fidelity.mean_kl_to_base is not None
    assert fidelity.mean_kl_to_base > 0.01  # the merged model contains the tuning
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert merged.generation_config.eos_token_id == [1, tokenizer.convert_tokens_to_ids("<end_of_turn>")]
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(adapter.folder).chat_template
    assert str(adapter.base_folder) not in "".join(path.read_text() for path in folder.glob("*.json"))


@pytest.mark.parametrize("quantization", ["none", "bf16", "f16", "f32"])
def test_unquantized_gguf_matches_the_model(exported: Exported, quantization: str) -> None:
    fidelity = fidelity_of(exported[0][f"gguf-{quantization}"])
    assert fidelity.argmax_agreement == 1.0
    assert fidelity.mean_kl_to_merged < 1e-4
    assert fidelity.compared_tokens > 100
    assert fidelity.sample_text
    assert fidelity.sample_prompt.startswith("<bos><start_of_turn>user\n")


def test_coarser_quantizations_are_further_from_the_model(exported: Exported) -> None:
    f16, q8, q4 = (exported[0][f"gguf-{name}"] for name in ("f16", "q8_0", "q4_k_m"))
    assert f16.size_bytes > q8.size_bytes > q4.size_bytes
    assert fidelity_of(f16).mean_kl_to_merged < fidelity_of(q8).mean_kl_to_merged < fidelity_of(q4).mean_kl_to_merged
    assert fidelity_of(q8).argmax_agreement > 0.95
    assert not fidelity_of(q8).closer_to_base


def test_perplexity_is_reported_with_model_and_base(exported: Exported, adapter: TrainedModel) -> None:
    import math

    import torch
    from transformers import AutoModelForCausalLM

    losses: list[float] = []
    base = AutoModelForCausalLM.from_pretrained(adapter.base_folder, dtype=torch.float32)
    for example in adapter.held_out_examples:
        ids = torch.tensor([example.input_ids])
        with torch.inference_mode():
            log_probs = base(input_ids=ids).logits[0].log_softmax(-1)
        losses += [-float(log_probs[i - 1, example.input_ids[i]]) for i in range(example.prompt_tokens, len(example.input_ids))]
    f16, q4, merged = (fidelity_of(exported[0][name]) for name in ("gguf-f16", "gguf-q4_k_m", "merged"))
    assert f16
    assert q4
    assert merged
    assert f16.labeled_tokens == q4.labeled_tokens == merged.labeled_tokens == len(losses)
    assert f16.perplexity_base == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    assert f16.perplexity == pytest.approx(f16.perplexity_merged, rel=1e-2)
    assert f16.perplexity_merged == q4.perplexity_merged == pytest.approx(merged.perplexity, rel=1e-6)
    assert f16.perplexity_merged != pytest.approx(f16.perplexity_base, rel=1e-2)
    assert q4.perplexity != pytest.approx(q4.perplexity_merged, rel=1e-3)


def test_importance_matrix_is_used_where_it_helps(exported: Exported) -> None:
    with_imatrix = {name for name, artifact in exported[0].items() if artifact.fidelity and fidelity_of(artifact).imatrix}
    assert with_imatrix == {"gguf-q4_k_m"}
    (decision,) = [event for event in exported[2].events if isinstance(event, DecisionMade) and event.setting == "gguf_imatrix"]
    assert (decision.value, decision.reason) == ("true", "it improves q4_k_m")


def test_lora_gguf_matches_the_model(exported: Exported) -> None:
    lora = exported[0]["lora-gguf"]
    assert lora.kind == "lora_gguf"
    assert lora.key == "gguf_models/job-1/attempt-1/gemma-3-270m-lora-f16.gguf"
    assert lora.size_bytes < exported[0]["gguf-f16"].size_bytes / 5
    assert fidelity_of(lora).argmax_agreement == 1.0
    assert fidelity_of(lora).mean_kl_to_merged < 1e-4
    assert fidelity_of(lora).mean_kl_to_base
    assert fidelity_of(lora).mean_kl_to_base > 0.01
    assert not fidelity_of(lora).advice


def test_modelfile_script_and_fidelity_lie_beside_their_gguf(exported: Exported, tmp_path: Path) -> None:
    artifacts, context, _ = exported
    verified = [artifact for artifact in artifacts.values() if artifact.kind in ("gguf", "lora_gguf")]
    for artifact in verified:
        folder = download_artifact(context.stores.models, artifact, tmp_path / artifact.name)
        stem = artifact.key.rpartition("/")[2].removesuffix(".gguf")
        assert [file.path for file in artifact.files] == ["", f"{stem}.Modelfile", f"{stem}.sh", f"{stem}.fidelity.json"]
        assert read_json(folder / f"{stem}.fidelity.json") == artifact.fidelity
        assert f" {stem}.gguf" in (folder / f"{stem}.sh").read_text()
        lines = (folder / f"{stem}.Modelfile").read_text().splitlines()
        named = [line.partition(" ./")[2] for line in lines if line.startswith(("FROM ", "ADAPTER "))]
        assert named == (["gemma-3-270m-base.gguf", f"{stem}.gguf"] if artifact.kind == "lora_gguf" else [f"{stem}.gguf"])
        assert {path.name for path in folder.iterdir()} >= {named[-1]}
    assert read_json(download_artifact(context.stores.models, artifacts["merged"], tmp_path / "merged") / "fidelity.json")["merged"]


def test_exported_command_line_runs(exported: Exported, tmp_path: Path) -> None:
    import subprocess

    from jobs.llm.llama_cpp import find_program

    artifacts, context, _ = exported
    folder = download_artifact(context.stores.models, artifacts["gguf-q8_0"], tmp_path)
    tool = find_program("llama-completion")
    assert tool
    completed = subprocess.run(
        ["sh", folder / "gemma-3-270m-q8_0.sh"], cwd="/", env={"PATH": f"{tool.parent}:/usr/bin:/bin"}, capture_output=True
    )
    assert completed.returncode == 0
    assert b"model\n" in completed.stdout


def test_gguf_has_chat_template_and_control_tokens(exported: Exported, adapter: TrainedModel, tmp_path: Path) -> None:
    from gguf import GGUFReader, TokenType
    from transformers import AutoTokenizer

    artifacts, context, _ = exported
    reader = GGUFReader(context.stores.models.download(artifacts["gguf-f16"].key, tmp_path / "f16.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(adapter.folder)
    types = reader.fields["tokenizer.ggml.token_type"].contents()
    for token in ("<start_of_turn>", "<end_of_turn>"):
        assert types[tokenizer.convert_tokens_to_ids(token)] == TokenType.CONTROL
    assert reader.fields["tokenizer.chat_template"].contents() == tokenizer.chat_template
    assert reader.fields["general.name"].contents() == "gemma-3-270m"


def test_adapter_is_exported_alone(adapter: TrainedModel, make_context: MakeContext, tmp_path: Path) -> None:
    context = make_context()
    (artifact,) = export_all(adapter, context)
    folder = download_artifact(context.stores.models, artifact, tmp_path / "downloaded")
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert read_json(folder / "adapter_config.json")["base_model_name_or_path"] == "google/gemma-3-270m"
    assert artifact.key == "trained_adapters/job-1/attempt-1/"


@pytest.mark.parametrize(("formats", "folder"), [("adapter", ""), (["merged", "adapter"], "adapter/")])
def test_adapter_beside_merged_model_has_its_own_folder_on_hub(
    formats: Any, folder: str, adapter: TrainedModel, make_context: MakeContext
) -> None:
    (artifact,) = export_adapter(ExportWorkspace(adapter, make_context(format=formats)))
    assert artifact.hub_folder == folder


@pytest.fixture(scope="module")
def exported_without_examples(adapter: TrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A LoRA job without held-out rows that asks for a GGUF file and no merged model."""
    record = EventRecorder()
    context = make_job_context(tmp_path_factory.mktemp("job"), record, include_gguf=True)
    artifacts = export_all(replace(adapter, held_out_examples=(), user_prompts=()), context)
    return {artifact.name: artifact for artifact in artifacts}, context, record


def test_gguf_beside_an_adapter_publishes_no_merged_model(exported_without_examples: Exported) -> None:
    artifacts, context, _ = exported_without_examples
    assert list(artifacts) == ["adapter", "gguf-q8_0"]
    assert not list(context.stores.models.iter_objects("merged_models/"))


def test_model_without_held_out_examples_is_verified(exported_without_examples: Exported) -> None:
    fidelity = fidelity_of(exported_without_examples[0]["gguf-q8_0"])
    assert fidelity.sample_prompt == "Once upon a time"
    assert fidelity.compared_tokens > 50


def test_full_model_needs_no_merge(full: TrainedModel, make_context: MakeContext, tmp_path: Path) -> None:
    context = make_context("Full", include_gguf=True, gguf_quantization="f16")
    merged, f16 = export_all(full, context)
    folder = download_artifact(context.stores.models, merged, tmp_path / "downloaded")
    assert (folder / "model.safetensors").read_bytes() == (full.folder / "model.safetensors").read_bytes()
    assert fidelity_of(f16).argmax_agreement == 1.0
    assert fidelity_of(f16).mean_kl_to_base
    assert fidelity_of(f16).mean_kl_to_base > 0.01


def test_merged_model_has_requested_dtype(adapter: TrainedModel, make_context: MakeContext, tmp_path: Path) -> None:
    context = make_context(format="merged", merged_dtype="fp16")
    (merged,) = export_all(adapter, context)
    folder = download_artifact(context.stores.models, merged, tmp_path / "downloaded")
    assert read_precision(folder) == "f16"
    assert read_json(folder / "config.json")["dtype"] == "float16"
    assert fidelity_of(merged).argmax_agreement > 0.99


def test_full_model_is_rounded_to_dtype_of_base(full: TrainedModel, make_context: MakeContext, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    float32_folder = tmp_path / "wide"
    merge_tensors(full.folder, float32_folder, torch.float32)
    for path in (*full.folder.glob("*.json"), *full.folder.glob("*.jinja")):
        (float32_folder / path.name).write_bytes(path.read_bytes())
    context = make_context("Full")
    (merged,) = export_all(replace(full, folder=float32_folder), context)
    folder = download_artifact(context.stores.models, merged, tmp_path / "downloaded")
    assert read_precision(folder) == "bf16"
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    assert fidelity_of(merged).mean_kl_to_merged < 1e-4


@pytest.fixture(scope="module")
def sensitive(full: TrainedModel, tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    """A full model in float32 whose predictions change when its weights are rounded to bfloat16, and not in float16."""
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(full.folder, tmp_path_factory.mktemp("sensitive") / "model"))
    weights = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    torch.manual_seed(4)
    for name, tensor in weights.items():
        if tensor.dim() > 1:
            tensor *= 1 + 0.003 * torch.randn_like(tensor)  # digits that bfloat16 does not have
        elif name == "model.norm.weight":
            tensor += 2000  # so large logits that rounding decides
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return replace(full, folder=folder)


def test_finer_precision_is_written_where_bfloat16_rounds_too_much(
    sensitive: TrainedModel, make_context: MakeContext, record: EventRecorder, tmp_path: Path
) -> None:
    context = make_context("Full")
    (merged,) = export_all(sensitive, context)
    folder = download_artifact(context.stores.models, merged, tmp_path / "downloaded")
    assert read_precision(folder) == "f16"
    assert read_json(folder / "config.json")["dtype"] == "float16"
    (decision,) = [event for event in record.events if isinstance(event, DecisionMade) and event.setting == "merged_dtype"]
    assert decision.value == "fp16"
    assert re.fullmatch(
        r"bf16 rounds too much: they agree on [\d.]+% of .*; fp16 keeps it: they agree on [\d.]+% of .*; the request sets no merged_dtype",
        decision.reason,
    )


def test_gguf_coarser_than_its_model_is_flagged_and_does_not_fail_the_job(
    sensitive: TrainedModel, make_context: MakeContext, record: EventRecorder
) -> None:
    context = make_context("Full", merged_dtype="fp32", include_gguf=True, gguf_quantization=["none", "bf16"])
    _, exact, coarse = export_all(sensitive, context)
    assert not fidelity_of(exact).advice
    assert fidelity_of(coarse).argmax_agreement < 0.99
    assert "gemma-3-270m-bf16.gguf rounds off some of the training" in fidelity_of(coarse).advice
    assert [event.code for event in record.events if isinstance(event, WarningRaised)] == ["low_fidelity"]


def test_requested_file_in_too_coarse_precision_gets_advice() -> None:
    coarse, distant = make_exported_file("bf16", too_coarse=True), make_eval_response(argmax_agreement=0.9, mean_kl_to_trained=0.3)
    check_fidelity(coarse, distant, make_answer())
    assert "rounds off some of the training" in make_advice(coarse, distant.comparison)
    assert not make_advice(coarse, make_eval_response().comparison)


def test_requested_precision_is_kept_and_fails_in_words(sensitive: TrainedModel, make_context: MakeContext) -> None:
    with pytest.raises(JobFailed, match="predictions differ from the trained model before it was rounded") as caught:
        export_all(sensitive, make_context("Full", merged_dtype="bf16"))
    assert caught.value.failure.hint == "use merged_dtype 'fp32', which rounds nothing"


def test_failed_export_names_the_checkpoint_that_needs_no_new_training(sensitive: TrainedModel, make_context: MakeContext) -> None:
    context = make_context("Full", merged_dtype="bf16")
    context.checkpoints.saved_step = 4
    for step, is_named in ((4, True), (5, False)):
        with pytest.raises(JobFailed) as caught:
            export_all(replace(sensitive, step=step), context)
        assert ("POST /jobs/job-1/checkpoints/4/export" in caught.value.failure.hint) == is_named


@pytest.mark.parametrize("is_adapter", [True, False])
@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32", None])
def test_precision_hints_name_only_what_a_request_may_say(is_adapter: bool, dtype: Any) -> None:
    hint = make_precision_hint(dtype, is_adapter=is_adapter)
    for name, value in re.findall(r"(merged_dtype|format) '(\w+)'", hint):
        config = {"base_model_id": "a/b", "method": "LoRA" if is_adapter else "Full", "export_config": {name: value}}
        SftConfig.model_validate(config).reject_unused_fields()
    assert ("adapter" in hint) == is_adapter
    assert bool(hint) == (is_adapter or dtype in ("bf16", "f16"))


def test_float16_overflow_is_rejected_with_hint(full: TrainedModel, make_context: MakeContext, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(full.folder, tmp_path / "large"))
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = 1e5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(JobFailed, match=r"model\.norm\.weight has numbers that are too large for f16") as caught:
        export_all(replace(full, folder=folder), make_context("Full", merged_dtype="fp16"))
    assert "bf16 or fp32" in caught.value.failure.hint


def test_gguf_that_differs_in_llama_cpp_is_rejected(full: TrainedModel, make_context: MakeContext, tmp_path: Path) -> None:
    # llama.cpp gives every sixth layer of a Gemma 3 full attention and ignores layer_types.
    import json
    import shutil

    folder = Path(shutil.copytree(full.folder, tmp_path / "unusual"))
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps(config | {"layer_types": ["full_attention", "sliding_attention"] * 3}))
    context = make_context("Full", include_gguf=True, gguf_quantization="f32")
    with pytest.raises(JobFailed, match="predictions differ from the trained model") as caught:
        export_all(replace(full, folder=folder), context)
    assert caught.value.failure.code == "export_failed"
    assert not list(context.stores.models.iter_objects(""))


def test_corrupt_gguf_is_rejected(workspace: ExportWorkspace, tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + bytes(200))
    with pytest.raises(JobFailed, match=r"llama\.cpp cannot run broken\.gguf") as caught:
        GgufVerifier(workspace).verify(ExportedFile(path, "f16"))
    assert caught.value.failure.code == "export_failed"


def test_gguf_matches_llama_cpp_converter_byte_for_byte(exported: Exported, adapter: TrainedModel, tmp_path: Path) -> None:
    from jobs.llm.llama_cpp import get_converter_path

    artifacts, context, _ = exported
    merged = download_artifact(context.stores.models, artifacts["merged"], tmp_path / "merged")
    staging = make_staging_folder(merged, merged, [adapter.base_folder], tmp_path / "staging")
    options = ["--outtype", "bf16", "--model-name", "gemma-3-270m"]
    run_program("convert", [sys.executable, str(get_converter_path()), str(staging), *options, "--outfile", str(tmp_path / "plain.gguf")])
    assert sha256_of(tmp_path / "plain.gguf") == artifacts["gguf-bf16"].sha256


def test_llama_cpp_crash_raises_error_with_output() -> None:
    crash = "import os, signal; print('last line'); import sys; sys.stdout.flush(); os.kill(os.getpid(), signal.SIGSEGV)"
    with pytest.raises(SubprocessFailed, match="quantize was killed by SIGSEGV: last line"):
        run_program("quantize", [sys.executable, "-c", crash])


def test_cancel_ends_the_llama_cpp_process() -> None:
    import psutil

    before = set(psutil.Process().children())
    with raise_after(Stopped("cancel"), after_s=0.3), pytest.raises(Stopped):
        run_program("convert", [sys.executable, "-c", "import time; time.sleep(60)"])
    assert set(psutil.Process().children()) <= before


def test_non_finite_weights_are_rejected(adapter: TrainedModel, make_context: MakeContext, tmp_path: Path) -> None:
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(adapter.folder, tmp_path / "diverged"))
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name: torch.full_like(tensor, float("nan")) for name, tensor in weights.items()}, folder / "adapter_model.safetensors")
    diverged = replace(adapter, folder=folder)
    for export_config in ({"format": "adapter"}, {"format": "merged"}):
        with pytest.raises(JobFailed, match="not finite") as caught:
            export_all(diverged, make_context(**export_config))
        assert "learning_rate" in caught.value.failure.hint


def test_tokenizer_edge_cases_include_runs_of_spaces() -> None:
    assert any(" " * 8 in text for text in TOKENIZER_EDGE_CASES)


def test_staging_marks_turn_tokens_as_special(workspace: ExportWorkspace, adapter: TrainedModel, tmp_path: Path) -> None:
    staging = make_staging_folder(workspace.merged_model.folder, workspace.merged_model.folder, [adapter.base_folder], tmp_path / "staging")
    added_tokens = read_json(staging / "tokenizer_config.json")["added_tokens_decoder"]
    special = {token["content"]: token["special"] for token in added_tokens.values()}
    assert special["<start_of_turn>"]
    assert special["<end_of_turn>"]
    assert "added_tokens_decoder" not in read_json(workspace.merged_model.folder / "tokenizer_config.json")


def test_only_unquantized_gguf_must_match_the_model() -> None:
    response = make_eval_response(argmax_agreement=0.5, mean_kl_to_trained=1.0)
    check_fidelity(make_exported_file("q4_k_m"), response, make_answer())
    for quantization in ("none", "f32", "f16", "bf16"):
        with pytest.raises(JobFailed, match=r"agree on 50\.0% of 10 tokens"):
            check_fidelity(make_exported_file(quantization), response, make_answer())


def test_closer_to_base_is_detected() -> None:
    assert is_closer_to_base(make_comparison(mean_kl_to_trained=0.84, mean_kl_to_base=0.16))
    assert not is_closer_to_base(make_comparison(mean_kl_to_trained=0.16, mean_kl_to_base=0.84))
    assert not is_closer_to_base(make_comparison(mean_kl_to_trained=0.001, mean_kl_to_base=0.0))  # training that changed nothing
    assert not is_closer_to_base(make_comparison(mean_kl_to_trained=0.84, mean_kl_to_base=None))


def test_file_closer_to_base_gives_warning(
    adapter: TrainedModel, make_context: MakeContext, record: EventRecorder, base_gguf: Path
) -> None:
    # The base's own file is like a quantization that removed every change.
    workspace = ExportWorkspace(replace(adapter, user_prompts=()), make_context(include_gguf=True))
    fidelity = GgufVerifier(workspace).verify(ExportedFile(base_gguf, "q2_k"))
    assert fidelity.closer_to_base
    (warning,) = [event for event in record.events if isinstance(event, WarningRaised)]
    assert warning.code == "closer_to_base"
    assert "q8_0 or f16" in warning.message


def test_incomplete_lora_gguf_is_flagged_with_advice() -> None:
    incomplete = make_exported_file("f16", base=Path("base.gguf"), missing_weights="the trained embeddings of 2 tokens")
    distant = make_eval_response(argmax_agreement=0.9, mean_kl_to_trained=0.3, mean_kl_to_base=0.1)
    check_fidelity(incomplete, distant, make_answer())
    advice = make_advice(incomplete, distant.comparison)
    assert "lacks the trained embeddings of 2 tokens" in advice
    assert "closer to the base model; use include_gguf" in advice
    assert not make_advice(incomplete, make_eval_response().comparison)  # the missing embeddings changed little
    with pytest.raises(JobFailed, match="predictions differ from"):
        check_fidelity(make_exported_file("f16", base=Path("base.gguf")), distant, make_answer())


@pytest.mark.parametrize(
    ("positions", "agreement", "kl", "outcome"),
    [
        (124, 0.99, 0.0001, "accepted"),
        (124, 0.96, 0.008, "lossy"),  # five tokens can differ by chance
        (2000, 0.96, 0.008, "lossy"),
        (2000, 0.95, 0.008, "rejected"),
        (124, 0.90, 0.008, "rejected"),
        (124, 1.0, 0.03, "rejected"),
    ],
)
def test_merged_model_deviation_is_a_loss_or_an_error(positions: int, agreement: float, kl: float, outcome: str) -> None:
    comparison = make_comparison(positions=positions, argmax_agreement=agreement, mean_kl_to_trained=kl)
    if outcome == "rejected":
        with pytest.raises(RoundsTooMuch, match="they agree on"):
            check_merge_fidelity(comparison, None, None)
        return
    assert bool(check_merge_fidelity(comparison, make_answer(), make_answer())) == (outcome == "lossy")


def test_other_answer_of_merged_model_is_an_error() -> None:
    other = GreedyAnswer((0, 0), make_answer().log_probs)
    with pytest.raises(RoundsTooMuch, match="differ from token 2 on"):
        check_merge_fidelity(make_comparison(), make_answer(), other)
    assert check_merge_fidelity(make_comparison(), make_answer(margin=TIE_NATS / 2), other) is None  # rounding decides between the two
    assert check_merge_fidelity(make_comparison(max_difference_nats=3.0), make_answer(), other) is None


def test_other_answer_of_lossless_file_is_rejected() -> None:
    other = make_eval_response(sample_ids=(1, 1))
    with pytest.raises(JobFailed, match="answers a held-out prompt in other words than the trained model, from token 1 on"):
        check_fidelity(make_exported_file("f16"), other, make_answer())
    check_fidelity(make_exported_file("q8_0"), other, make_answer())
    check_fidelity(make_exported_file("bf16", too_coarse=True), other, make_answer())
    check_fidelity(make_exported_file("f16"), make_eval_response(), make_answer())


def test_near_ties_count_as_agreement() -> None:
    import numpy as np

    trained = log_softmax(np.array([[2.0, 2.0 - TIE_NATS / 2, 0.0], [2.0, 1.0, 0.0]], dtype=np.float32))
    other = np.array([[1.0, 2.0, 0.0], [1.0, 2.0, 0.0]], dtype=np.float32)
    assert compare(iter(other), trained).argmax_agreement == 0.5


def test_model_has_zero_distance_to_itself() -> None:
    import numpy as np

    logits = np.random.default_rng(1).normal(size=(5, 1000), scale=5).astype(np.float32)
    comparison = compare(iter(logits), log_softmax(logits), log_softmax(logits[::-1]))
    assert (comparison.positions, comparison.argmax_agreement, comparison.mean_kl_to_trained) == (5, 1.0, pytest.approx(0, abs=1e-6))
    assert comparison.mean_kl_to_base
    assert comparison.mean_kl_to_base > 1


def test_perplexity_counts_only_labeled_tokens() -> None:
    import math

    import numpy as np

    passages = [Passage(ids=(7, 1, 2, 0), compared_tokens=3, answer_start=2), Passage(ids=(0, 0), compared_tokens=2)]
    assert list_targets(passages) == [2, 0, None, None, None]
    rows = np.log(np.array([[0.2, 0.3, 0.5], [0.25, 0.25, 0.5], [1 / 3] * 3, [1 / 3] * 3, [1 / 3] * 3], dtype=np.float32))
    comparison = compare(iter(rows), rows, rows[:, ::-1], list_targets(passages))
    assert comparison.labeled_positions == 2
    assert comparison.perplexity == pytest.approx(math.exp(-(math.log(0.5) + math.log(0.25)) / 2))
    assert comparison.perplexity_trained == pytest.approx(comparison.perplexity)
    assert comparison.perplexity_base == pytest.approx(math.exp(-(math.log(0.2) + math.log(0.5)) / 2))


@pytest.mark.parametrize(("rows", "message"), [(4, "4 positions"), (6, "more positions"), (5, "not finite")])
def test_invalid_comparison_raises(rows: int, message: str) -> None:
    import numpy as np

    logits = np.zeros((rows, 10), dtype=np.float32)
    if rows == 5:
        logits[3, 3] = np.nan
    with pytest.raises(ValueError, match=message):
        compare(iter(logits), log_softmax(np.zeros((5, 10), dtype=np.float32)))


def test_long_examples_are_cut_around_the_answer_start() -> None:
    example = HeldOutExample(prompt_text="", input_ids=tuple(range(1000)), prompt_tokens=600)
    (passage,) = make_passages([example], tokenizer=None)  # pyright: ignore[reportArgumentType]  # unused
    assert len(passage.ids) == MAX_PASSAGE_TOKENS
    assert passage.ids[0] == 0
    assert {599, 600, 601} <= set(passage.ids)
    assert passage.answer_start
    assert passage.ids[passage.answer_start] == 600  # the first token of the answer
    assert passage.compared_tokens <= MAX_POSITIONS


def test_sample_continues_the_shortest_prompt() -> None:
    examples = [HeldOutExample("a long one", tuple(range(20)), 10), HeldOutExample("short", tuple(range(5)), 3)]
    unused: Any = None
    assert select_sample_prompt((), examples, unused, unused) == ("short", (0, 1, 2))


@pytest.fixture
def workspace(adapter: TrainedModel, make_context: MakeContext) -> ExportWorkspace:
    return ExportWorkspace(adapter, make_context(include_gguf=True))


def make_exported_file(quantization: Any, **overrides: Any) -> ExportedFile:
    return ExportedFile(Path("x.gguf"), quantization, **overrides)


def make_comparison(**changes: Any) -> Comparison:
    defaults = {"positions": 10, "argmax_agreement": 1.0, "mean_kl_to_trained": 0.0, "mean_kl_to_base": 1.0, "max_difference_nats": 0.0}
    return Comparison.model_validate(defaults | changes)


def make_eval_response(sample_ids: tuple[int, ...] = (0, 1), **changes: Any) -> EvalResponse:
    report = VocabularyReport(token_ids=[])
    return EvalResponse(vocabulary=report, comparison=make_comparison(**changes), sample_ids=list(sample_ids), sample_text="x")


def make_answer(*, margin: float = 5.0) -> GreedyAnswer:
    """The answer of the tokens 0 and 1, each more likely than the other one by a factor of exp(margin)."""
    import numpy as np

    return GreedyAnswer((0, 1), log_softmax(np.array([[margin, 0.0], [0.0, margin]], dtype=np.float32)))


def download_artifact(store: ObjectStore, artifact: Artifact, target: Path) -> Path:
    for file in artifact.files:
        key = artifact.file_key(file)
        store.download(key, target / (file.path or key.rpartition("/")[2]))
    return target


class raise_after:  # noqa: N801  # reads as a statement
    """Raises an error in the main thread after `after_s`, as a signal handler does."""

    def __init__(self, error: BaseException, after_s: float) -> None:
        self.error, self.after_s = error, after_s

    def __enter__(self) -> None:
        def raise_error(number: int, frame: FrameType | None) -> None:
            raise self.error

        self.previous_handler = signal.signal(signal.SIGALRM, raise_error)
        signal.setitimer(signal.ITIMER_REAL, self.after_s)

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self.previous_handler)
