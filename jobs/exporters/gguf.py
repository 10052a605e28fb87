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

from jobs.errors import JobFailed
from jobs.exporters.examiner import Candidate, Examiner
from jobs.exporters.folders import (
    FIDELITY,
    MODEL_FILES,
    PROCESSOR_FILES,
    SETTINGS_FILES,
    TOKENIZER_SETTINGS,
    copy_files,
    copy_tokenizer,
    dtype_of,
    link_or_copy,
    precision,
    weights,
    write_json,
)
from jobs.exporters.howto import command_line, modelfile, script
from jobs.exporters.streaming import read_header, stream
from jobs.llama import program
from jobs.llama.apart import ProgramFailed, convert, importance, quantize
from jobs.llama.contents import numbers_in
from jobs.publish import Product
from schema.export import GgufQuantization

if TYPE_CHECKING:
    from jobs.exporters.bench import Bench

SENTENCEPIECE = "tokenizer.model"

# Those whose rounding llama.cpp weighs; q8_0 loses too little to gain.
WEIGHED: tuple[GgufQuantization, ...] = ("q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q3_k_m", "q2_k")
# Reading 2048 tokens takes Gemma 270M 10 s on two cores, and a mean of squares over them is steady.
CALIBRATION_TOKENS = 2048
CHUNK_TOKENS = 256
FEWEST_CHUNK_TOKENS = 16
SPLIT_AGAIN = 0.9  # the rows' tokens as text may come out as fewer tokens


def export(bench: "Bench") -> tuple[Product, ...]:
    """One product for each quantization, in the order asked for. Raises JobFailed `export_failed`."""
    whole = bench.whole  # before the phase: making it is one of its own
    bench.context.phase("converting")
    try:
        candidates = _write_files(bench, whole.folder)
    except ProgramFailed as error:
        hint = "the log of the attempt has all that it said"
        raise JobFailed("export_failed", f"no GGUF file could be written: {error}", hint) from error
    bench.context.phase("verifying")
    examiner = Examiner(bench)
    products: list[Product] = []
    for candidate in candidates:
        bench.context.check()
        name, path = f"gguf-{candidate.quantization}", candidate.path
        fidelity = examiner.examine(candidate)
        products.append(Product(name=name, kind="gguf", path=path, key=bench.key("gguf", path.name), fidelity=fidelity))
        tell_how(bench, candidate, examiner.prompt)
    if sees(whole.folder):
        products += _vision_part(bench, whole.folder)
    note_fidelity(bench, products)
    return tuple(products)


def stage(model: Path, tokenizer: Path, sources: Sequence[Path], staging: Path) -> Path:
    """A copy of a model folder that llama.cpp's converter reads as it is meant.

    The converter takes the pieces from tokenizer.model, and what kind each one is from `added_tokens_decoder`, which
    transformers 5 no longer writes. Without it `<start_of_turn>` is an ordinary word, and llama.cpp takes it apart.
    """
    copy_files(model, staging, [*MODEL_FILES, *PROCESSOR_FILES, *weights(model)])
    copy_tokenizer(tokenizer, staging)
    sentencepiece = next((folder / SENTENCEPIECE for folder in sources if (folder / SENTENCEPIECE).is_file()), None)
    if sentencepiece is not None:
        link_or_copy(sentencepiece, staging / SENTENCEPIECE)
        path = staging / TOKENIZER_SETTINGS
        write_json(path, json.loads(path.read_text()) | {"added_tokens_decoder": _added_tokens(staging)})
    return staging


def sees(model: Path) -> bool:
    """Whether a model folder has a part that looks at images, whatever was trained of it."""
    return "vision_config" in json.loads((model / "config.json").read_text())


def tell_how(bench: "Bench", candidate: Candidate, prompt: str) -> None:
    """Write beside a file how it is run. Raises JobFailed when the command does not work."""
    from importlib.metadata import version

    import torch

    folder, path = bench.howto(), candidate.path
    base, adapter = (candidate.base, path) if candidate.base else (path, None)
    (folder / f"{path.stem}.Modelfile").write_text(modelfile(base.name, bench.tokenizer, adapter and adapter.name))
    bos = str(bench.tokenizer.bos_token or "")
    command = command_line(base, prompt, bos, threads=torch.get_num_threads(), adapter=adapter)
    if command is not None:
        (folder / f"{path.stem}.sh").write_text(script(command, version("llama_cpp_python")))


def note_fidelity(bench: "Bench", products: Sequence[Product]) -> None:
    """Add what was measured to the file that lies beside the GGUF files."""
    path = bench.howto() / FIDELITY
    known: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}  # Any: JSON
    write_json(path, known | {product.name: product.fidelity.model_dump(mode="json") for product in products if product.fidelity})


def _write_files(bench: "Bench", whole: Path) -> list[Candidate]:
    """One file for each quantization, in the order asked for. Raises ProgramFailed, JobFailed."""
    import torch

    own, trained, threads = precision(whole), bench.trained, torch.get_num_threads()
    converted = bench.path(f"converted-{own}.gguf")
    staging = stage(whole, whole, [trained.folder, trained.base_folder], bench.path("staging"))
    convert(staging, converted, precision=own, name=bench.model_name)
    imatrix = importance_matrix(bench, converted)
    candidates: list[Candidate] = []
    for quantization in bench.settings.gguf_quantizations:
        bench.context.check()
        path, weighed = _path(bench, quantization), imatrix if quantization in WEIGHED else None
        if quantization in ("none", own):
            link_or_copy(converted, path)
        elif not path.is_file():  # the training rows may have been read with it
            quantize(converted, path, file_type=quantization, threads=threads, imatrix=weighed)
        candidates.append(Candidate(path, quantization, imatrix=weighed is not None))
    converted.unlink()
    return candidates


def _path(bench: "Bench", quantization: GgufQuantization) -> Path:
    return bench.path(f"{bench.model_name}-{quantization}.gguf")


# --- the part that sees ---


def _vision_part(bench: "Bench", whole: Path) -> list[Product]:
    """What llama.cpp loads beside the language part to look at images (--mmproj), where its converter knows the model.

    Nothing here can look at an image with it: it is only read back, and every number of the model's must be in it.
    """
    path, own = bench.path(f"{bench.model_name}-mmproj-{precision(whole)}.gguf"), precision(whole)
    staging = bench.path("staging")
    if any(_older_name(tensor.name) != tensor.name for name in weights(whole) for tensor in read_header(whole / name)):
        staging = _with_older_names(bench, whole)
    try:
        convert(staging, path, precision=own, name=bench.model_name, sees=True)
    except ProgramFailed as error:
        message = f"llama.cpp's converter cannot write the part of this model that sees, only the language part: {error}"
        bench.context.warn("no_mmproj", message)
        return []
    _refuse_incomplete(path, whole)
    return [Product(name="gguf-mmproj", kind="gguf", path=path, key=bench.key("gguf", path.name))]


def _older_name(name: str) -> str:
    """transformers 5 took a level out of the names of Gemma's vision tower, which llama.cpp's converter goes by."""
    tower, inner = "vision_tower.", "vision_tower.vision_model."
    return name.replace(tower, inner, 1) if name.startswith(tower) and not name.startswith(inner) else name


def _with_older_names(bench: "Bench", whole: Path) -> Path:
    folder, torch_dtype = bench.path("staging-vision"), dtype_of(precision(whole))
    stream(whole, folder, torch_dtype, naming=_older_name)
    copy_files(whole, folder, [*SETTINGS_FILES, *PROCESSOR_FILES])
    copy_tokenizer(whole, folder)
    return folder


def _refuse_incomplete(path: Path, whole: Path) -> None:
    written = numbers_in(path)
    stored = [tensor for name in weights(whole) for tensor in read_header(whole / name)]
    wanted = sum(prod(tensor.shape) for tensor in stored if "vision_tower." in tensor.name or "multi_modal_projector." in tensor.name)
    if written != wanted:
        message = f"{path.name} has {written} numbers, and the part of the model that sees has {wanted}"
        raise JobFailed("export_failed", message, "leave include_gguf out; please report this with the job's log")


# --- what matters ---


def importance_matrix(bench: "Bench", converted: Path) -> Path | None:
    """What the training rows say of each weight, for the quantizations that gain by it; None without, and why is told.

    Raises JobFailed where it was asked for and cannot be had.
    """
    asked, context = bench.settings.gguf_imatrix, bench.context
    gaining = [name for name in bench.settings.gguf_quantizations if name in WEIGHED]
    text, chunk_tokens = _calibration(bench)
    why_not = _why_unweighed(asked, gaining, chunk_tokens)
    if why_not:
        if asked:
            context.warn("no_imatrix", f"the files were quantized without an importance matrix: {why_not}")
        elif gaining:
            context.decided("gguf_imatrix", "false", why_not)
        return None
    context.decided("gguf_imatrix", "true", f"{', '.join(gaining)} gain by it" if asked is None else "the request says so")
    try:
        return _measured(bench, converted, text, chunk_tokens)
    except ProgramFailed as error:
        if asked:
            raise JobFailed("export_failed", f"no importance matrix could be made: {error}", "leave gguf_imatrix out") from error
        context.warn("no_imatrix", f"the files were quantized without an importance matrix: {error}")
        return None


def _why_unweighed(asked: bool | None, gaining: Sequence[str], chunk_tokens: int) -> str:
    if asked is False:
        return "the request says so"
    if not gaining:
        return f"none of the quantizations asked for gains by it; {', '.join(WEIGHED)} do"
    if program("llama-imatrix") is None:
        return "llama.cpp's llama-imatrix is not installed; infra/llama_cpp.sh builds it"
    return "" if chunk_tokens >= FEWEST_CHUNK_TOKENS else "there is too little text in the training rows"


def _calibration(bench: "Bench") -> tuple[str, int]:
    """Training rows as text, and how many tokens of it to read at once: at least two such chunks are needed."""
    texts, count = [], 0
    for ids in bench.trained.calibration:
        texts.append(str(bench.tokenizer.decode(list(ids[: CALIBRATION_TOKENS - count]))))
        count += len(ids)
        if count >= CALIBRATION_TOKENS:
            break
    return "\n".join(texts), min(CHUNK_TOKENS, int(min(count, CALIBRATION_TOKENS) * SPLIT_AGAIN) // 2)


def _measured(bench: "Bench", converted: Path, text: str, chunk_tokens: int) -> Path:
    """Run the model over the text: rounded to eight bits, which is three times as fast and moves no average."""
    import torch

    threads, eight_bits, written = torch.get_num_threads(), _path(bench, "q8_0"), bench.path("calibration.txt")
    written.write_text(text)
    quantize(converted, eight_bits, file_type="q8_0", threads=threads)
    bench.context.check()
    importance(eight_bits, written, bench.path("imatrix.gguf"), chunk_tokens=chunk_tokens, threads=threads)
    if "q8_0" not in bench.settings.gguf_quantizations:
        eight_bits.unlink()
    return bench.path("imatrix.gguf")


# --- the tokenizer ---


def _added_tokens(folder: Path) -> dict[str, dict[str, Any]]:  # Any: JSON
    """Every piece that is taken whole, by id, as `tokenizer_config.json` used to list them."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString((folder / SENTENCEPIECE).read_bytes())
    defined = [(i, piece.piece) for i, piece in enumerate(model.pieces) if piece.type == piece.USER_DEFINED]
    kinds = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    listed = {str(i): {"content": content, **kinds} for i, content in defined}
    for token in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]:
        listed[str(token.pop("id"))] = token
    return listed
