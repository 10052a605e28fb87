"""GGUF files for llama.cpp and Ollama: converted once, quantized for each name asked for, and each one heard before it goes out.

whole model ── staging folder (tokenizer mended) ── llama.cpp's converter ── one file in the model's own precision
training rows ── llama-imatrix ── what matters ──┐
                                                 llama.cpp's quantizer ── one file per quantization
"""

import json
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.llm.exporters.model_files import (
    CONFIG_FILES,
    FIDELITY_FILE,
    MODEL_FILES,
    PROCESSOR_FILES,
    TOKENIZER_CONFIG_FILE,
    copy_files,
    copy_tokenizer,
    link_or_copy,
    list_weight_files,
    read_precision,
    to_torch_dtype,
    write_json,
)
from jobs.llm.exporters.tensor_merge import merge_tensors, read_header
from jobs.llm.exporters.usage import make_modelfile, make_run_script, verify_command
from jobs.llm.exporters.verify import ExportedFile, GgufVerifier
from jobs.llm.llama_cpp import find_program
from jobs.llm.llama_cpp.gguf_reader import count_weights
from jobs.llm.llama_cpp.runner import compute_imatrix, convert, quantize
from jobs.runtime.artifacts import ExportedArtifact
from jobs.runtime.errors import JobFailed
from jobs.runtime.subprocesses import SubprocessFailed
from schema.training.export import GgufQuantization

if TYPE_CHECKING:
    from jobs.llm.exporters.workspace import ExportWorkspace

SENTENCEPIECE_FILE = "tokenizer.model"

# Those whose rounding llama.cpp weighs; q8_0 loses too little to gain.
IMATRIX_QUANTIZATIONS: tuple[GgufQuantization, ...] = ("q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q3_k_m", "q2_k")
# Reading 2048 tokens takes Gemma 270M 10 s on two cores, and a mean of squares over them is steady.
CALIBRATION_TOKENS = 2048
CHUNK_TOKENS = 256
MIN_CHUNK_TOKENS = 16
RETOKENIZED_FRACTION = 0.9  # the rows' tokens as text may come out as fewer tokens


def export(workspace: "ExportWorkspace") -> tuple[ExportedArtifact, ...]:
    """One product for each quantization, in the order asked for. Raises JobFailed `export_failed`."""
    whole = workspace.merged_model  # before the phase: making it is one of its own
    workspace.context.enter_phase("converting")
    try:
        candidates = _write_files(workspace, whole.folder)
    except SubprocessFailed as error:
        hint = "the log of the attempt has all that it said"
        raise JobFailed("export_failed", f"no GGUF file could be written: {error}", hint) from error
    workspace.context.enter_phase("verifying")
    examiner = GgufVerifier(workspace)
    products: list[ExportedArtifact] = []
    for candidate in candidates:
        workspace.context.check_stop()
        name, path = f"gguf-{candidate.quantization}", candidate.path
        fidelity = examiner.verify(candidate)
        products.append(ExportedArtifact(name=name, kind="gguf", path=path, key=workspace.key("gguf", path.name), fidelity=fidelity))
        write_usage(workspace, candidate, examiner.sample_prompt)
    if has_vision_tower(whole.folder):
        products += _export_mmproj(workspace, whole.folder)
    record_fidelity(workspace, products)
    return tuple(products)


def make_staging_folder(model: Path, tokenizer: Path, sources: Sequence[Path], staging: Path) -> Path:
    """A copy of a model folder that llama.cpp's converter reads as it is meant.

    The converter takes the pieces from tokenizer.model, and what kind each one is from `added_tokens_decoder`, which
    transformers 5 no longer writes. Without it `<start_of_turn>` is an ordinary word, and llama.cpp takes it apart.
    """
    copy_files(model, staging, [*MODEL_FILES, *PROCESSOR_FILES, *list_weight_files(model)])
    copy_tokenizer(tokenizer, staging)
    sentencepiece = next((folder / SENTENCEPIECE_FILE for folder in sources if (folder / SENTENCEPIECE_FILE).is_file()), None)
    if sentencepiece is not None:
        link_or_copy(sentencepiece, staging / SENTENCEPIECE_FILE)
        path = staging / TOKENIZER_CONFIG_FILE
        write_json(path, json.loads(path.read_text()) | {"added_tokens_decoder": _make_added_tokens_decoder(staging)})
    return staging


def has_vision_tower(model: Path) -> bool:
    """Whether a model folder has a part that looks at images, whatever was trained of it."""
    return "vision_config" in json.loads((model / "config.json").read_text())


def write_usage(workspace: "ExportWorkspace", candidate: ExportedFile, prompt: str) -> None:
    """Write beside a file how it is run. Raises JobFailed when the command does not work."""
    from importlib.metadata import version

    import torch

    folder, path = workspace.usage_folder(), candidate.path
    base, adapter = (candidate.base, path) if candidate.base else (path, None)
    (folder / f"{path.stem}.Modelfile").write_text(make_modelfile(base.name, workspace.tokenizer, adapter and adapter.name))
    bos = str(workspace.tokenizer.bos_token or "")
    command = verify_command(base, prompt, bos, threads=torch.get_num_threads(), adapter=adapter)
    if command is not None:
        (folder / f"{path.stem}.sh").write_text(make_run_script(command, version("llama_cpp_python")))


def record_fidelity(workspace: "ExportWorkspace", products: Sequence[ExportedArtifact]) -> None:
    """Add what was measured to the file that lies beside the GGUF files."""
    path = workspace.usage_folder() / FIDELITY_FILE
    known: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}  # Any: JSON
    write_json(path, known | {product.name: product.fidelity.model_dump(mode="json") for product in products if product.fidelity})


def _write_files(workspace: "ExportWorkspace", model_folder: Path) -> list[ExportedFile]:
    """One file for each quantization, in the order asked for. Raises ProgramFailed, JobFailed."""
    import torch

    own, trained, threads = read_precision(model_folder), workspace.trained, torch.get_num_threads()
    converted = workspace.path(f"converted-{own}.gguf")
    staging = make_staging_folder(model_folder, model_folder, [trained.folder, trained.base_folder], workspace.path("staging"))
    convert(staging, converted, precision=own, name=workspace.model_name)
    imatrix = make_imatrix(workspace, converted)
    candidates: list[ExportedFile] = []
    for quantization in workspace.export_config.gguf_quantizations:
        workspace.context.check_stop()
        path, weighed = _gguf_path(workspace, quantization), imatrix if quantization in IMATRIX_QUANTIZATIONS else None
        if quantization in ("none", own):
            link_or_copy(converted, path)
        elif not path.is_file():  # the training rows may have been read with it
            quantize(converted, path, file_type=quantization, threads=threads, imatrix=weighed)
        candidates.append(ExportedFile(path, quantization, imatrix=weighed is not None))
    converted.unlink()
    return candidates


def _gguf_path(workspace: "ExportWorkspace", quantization: GgufQuantization) -> Path:
    return workspace.path(f"{workspace.model_name}-{quantization}.gguf")


# --- the part that sees ---


def _export_mmproj(workspace: "ExportWorkspace", model_folder: Path) -> list[ExportedArtifact]:
    """What llama.cpp loads beside the language part to look at images (--mmproj), where its converter knows the model.

    Nothing here can look at an image with it: it is only read back, and every number of the model's must be in it.
    """
    path, own = workspace.path(f"{workspace.model_name}-mmproj-{read_precision(model_folder)}.gguf"), read_precision(model_folder)
    staging = workspace.path("staging")
    if any(
        _to_legacy_name(tensor.name) != tensor.name
        for name in list_weight_files(model_folder)
        for tensor in read_header(model_folder / name)
    ):
        staging = _stage_legacy_names(workspace, model_folder)
    try:
        convert(staging, path, precision=own, name=workspace.model_name, mmproj=True)
    except SubprocessFailed as error:
        message = f"llama.cpp's converter cannot write the part of this model that sees, only the language part: {error}"
        workspace.context.warn("mmproj_not_exported", message)
        return []
    _check_complete(path, model_folder)
    return [ExportedArtifact(name="gguf-mmproj", kind="gguf", path=path, key=workspace.key("gguf", path.name))]


def _to_legacy_name(name: str) -> str:
    """transformers 5 took a level out of the names of Gemma's vision tower, which llama.cpp's converter goes by."""
    tower, inner = "vision_tower.", "vision_tower.vision_model."
    return name.replace(tower, inner, 1) if name.startswith(tower) and not name.startswith(inner) else name


def _stage_legacy_names(workspace: "ExportWorkspace", model_folder: Path) -> Path:
    folder, torch_dtype = workspace.path("staging-vision"), to_torch_dtype(read_precision(model_folder))
    merge_tensors(model_folder, folder, torch_dtype, rename_tensor=_to_legacy_name)
    copy_files(model_folder, folder, [*CONFIG_FILES, *PROCESSOR_FILES])
    copy_tokenizer(model_folder, folder)
    return folder


def _check_complete(path: Path, model_folder: Path) -> None:
    written = count_weights(path)
    stored = [tensor for name in list_weight_files(model_folder) for tensor in read_header(model_folder / name)]
    wanted = sum(prod(tensor.shape) for tensor in stored if "vision_tower." in tensor.name or "multi_modal_projector." in tensor.name)
    if written != wanted:
        message = f"{path.name} has {written} numbers, and the part of the model that sees has {wanted}"
        raise JobFailed("export_failed", message, "leave include_gguf out; please report this with the job's log")


# --- what matters ---


def make_imatrix(workspace: "ExportWorkspace", converted: Path) -> Path | None:
    """What the training rows say of each weight, for the quantizations that gain by it; None without, and why is told.

    Raises JobFailed where it was asked for and cannot be had.
    """
    asked, context = workspace.export_config.gguf_imatrix, workspace.context
    gaining = [name for name in workspace.export_config.gguf_quantizations if name in IMATRIX_QUANTIZATIONS]
    text, chunk_tokens = _make_calibration_text(workspace)
    why_not = _imatrix_skipped_reason(asked, gaining, chunk_tokens)
    if why_not:
        if asked:
            context.warn("imatrix_skipped", f"the files were quantized without an importance matrix: {why_not}")
        elif gaining:
            context.log_decision("gguf_imatrix", "false", why_not)
        return None
    context.log_decision("gguf_imatrix", "true", f"{', '.join(gaining)} gain by it" if asked is None else "the request says so")
    try:
        return _run_imatrix(workspace, converted, text, chunk_tokens)
    except SubprocessFailed as error:
        if asked:
            raise JobFailed("export_failed", f"no importance matrix could be made: {error}", "leave gguf_imatrix out") from error
        context.warn("imatrix_skipped", f"the files were quantized without an importance matrix: {error}")
        return None


def _imatrix_skipped_reason(requested: bool | None, eligible: Sequence[str], chunk_tokens: int) -> str:
    if requested is False:
        return "the request says so"
    if not eligible:
        return f"none of the quantizations asked for gains by it; {', '.join(IMATRIX_QUANTIZATIONS)} do"
    if find_program("llama-imatrix") is None:
        return "llama.cpp's llama-imatrix is not installed; infra/llama_cpp.sh builds it"
    return "" if chunk_tokens >= MIN_CHUNK_TOKENS else "there is too little text in the training rows"


def _make_calibration_text(workspace: "ExportWorkspace") -> tuple[str, int]:
    """Training rows as text, and how many tokens of it to read at once: at least two such chunks are needed."""
    texts, count = [], 0
    for ids in workspace.trained.calibration:
        texts.append(str(workspace.tokenizer.decode(list(ids[: CALIBRATION_TOKENS - count]))))
        count += len(ids)
        if count >= CALIBRATION_TOKENS:
            break
    return "\n".join(texts), min(CHUNK_TOKENS, int(min(count, CALIBRATION_TOKENS) * RETOKENIZED_FRACTION) // 2)


def _run_imatrix(workspace: "ExportWorkspace", converted: Path, text: str, chunk_tokens: int) -> Path:
    """Run the model over the text: rounded to eight bits, which is three times as fast and moves no average."""
    import torch

    threads, eight_bits, written = torch.get_num_threads(), _gguf_path(workspace, "q8_0"), workspace.path("calibration.txt")
    written.write_text(text)
    quantize(converted, eight_bits, file_type="q8_0", threads=threads)
    workspace.context.check_stop()
    compute_imatrix(eight_bits, written, workspace.path("imatrix.gguf"), chunk_tokens=chunk_tokens, threads=threads)
    if "q8_0" not in workspace.export_config.gguf_quantizations:
        eight_bits.unlink()
    return workspace.path("imatrix.gguf")


# --- the tokenizer ---


def _make_added_tokens_decoder(folder: Path) -> dict[str, dict[str, Any]]:  # Any: JSON
    """Every piece that is taken whole, by id, as `tokenizer_config.json` used to list them."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString((folder / SENTENCEPIECE_FILE).read_bytes())
    defined = [(i, piece.piece) for i, piece in enumerate(model.pieces) if piece.type == piece.USER_DEFINED]
    kinds = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    listed = {str(i): {"content": content, **kinds} for i, content in defined}
    for token in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]:
        listed[str(token.pop("id"))] = token
    return listed
