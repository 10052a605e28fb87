"""GGUF files for llama.cpp and Ollama: converted once, quantized for each name asked for, and each one heard before it goes out.

whole model ── staging folder (tokenizer mended) ── llama.cpp's converter ── one file in the model's own precision
                                                    llama.cpp's quantizer ── one file per quantization
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.errors import JobFailed
from jobs.exporters.folders import MODEL_FILES, TOKENIZER_SETTINGS, copy_files, copy_tokenizer, link_or_copy, precision, weights, write_json
from jobs.exporters.speech import sample_of
from jobs.llama.apart import ProgramFailed, convert, evaluate, quantize
from jobs.llama.evaluate import Answer, Question
from jobs.llama.fidelity import Comparison
from jobs.publish import Product
from schema.job import Fidelity
from schema.training import GgufQuantization

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jobs.exporters.bench import Bench
    from jobs.trained import Probe

# Formats that keep the weights must speak like the model: the arithmetic alone differs (f16 1e-6 nats, bf16 5e-5 on Gemma 270M).
EXACT: tuple[GgufQuantization, ...] = ("none", "f32", "f16", "bf16")
EXACT_AGREEMENT = 0.99
EXACT_KL_NATS = 0.002
# Below this nobody can tell two models apart, and which of two others a file is nearer to means nothing.
NEGLIGIBLE_KL_NATS = 0.01

SAMPLE_TOKENS = 32
SAMPLE_PROMPT_CHARACTERS = 2000  # kept in the job's record

SENTENCEPIECE = "tokenizer.model"
TURN_MARKS = ("<start_of_turn>", "<end_of_turn>")
# What tokenizers get wrong: runs of spaces, tabs and line ends, other scripts, several code points in one picture.
HARD_TEXTS = (
    "a  b   c    d        e                f                                 g",
    "    indented\n\t\ttwice\n\n\n\nfar   below  ",
    "Ünïcödé – 模型 – مرحبا – 👩‍🚀🙂",
)


def export(bench: "Bench") -> tuple[Product, ...]:
    """One product for each quantization, in the order asked for. Raises JobFailed `export_failed`."""
    context = bench.context
    whole = bench.whole  # before the phase: making it is one of its own
    context.phase("converting")
    try:
        files = _write_files(bench, whole.folder)
    except ProgramFailed as error:
        raise JobFailed(
            "export_failed", f"no GGUF file could be written: {error}", "the log of the attempt has all that it said"
        ) from error
    context.phase("verifying")
    examiner = Examiner(bench)
    products: list[Product] = []
    for quantization, path in files.items():
        context.check()
        fidelity = examiner.examine(path, quantization)
        key = bench.key("gguf", path.name)
        products.append(Product(name=f"gguf-{quantization}", kind="gguf", path=path, key=key, fidelity=fidelity))
    return tuple(products)


class Examiner:
    """Hears each file out in a process of its own, and decides whether it may go out."""

    def __init__(self, bench: "Bench") -> None:
        self._bench, tokenizer = bench, bench.tokenizer
        self._texts = texts_of(bench.trained.probes, tokenizer)
        self._token_ids = [tokenizer.encode(text, add_special_tokens=False) for text in self._texts]
        self._prompt, self._prompt_ids = sample_of(bench.trained.probes, tokenizer)

    def examine(self, path: Path, quantization: GgufQuantization) -> Fidelity:
        """How the file speaks. Raises JobFailed when it does not, or not like the model it was made from."""
        try:
            answer = evaluate(self._question(path), self._bench.folder)
        except ProgramFailed as error:
            raise JobFailed("export_failed", f"{path.name} does not work in llama.cpp: {error}", _advice(quantization)) from error
        refuse_unfit(path.name, quantization, answer, self._token_ids)
        erased = erases_tuning(answer.comparison)
        if erased:
            self._bench.context.warn("erased_tuning", _erased(path.name, answer.comparison))
        if not answer.sample_text.strip():
            self._bench.context.warn("silent_model", f"{path.name} ends its answer to a held-out prompt before the first word")
        return self._fidelity(answer, erased)

    def _question(self, path: Path) -> Question:
        import torch

        whole = self._bench.whole
        return Question(
            file=str(path),
            threads=torch.get_num_threads(),  # what the launcher allowed
            texts=self._texts,
            passages=list(whole.passages),
            trained_log_probs=str(whole.log_probs),
            base_log_probs=str(whole.base_log_probs) if whole.base_log_probs else None,
            sample_ids=list(self._prompt_ids),
            sample_tokens=SAMPLE_TOKENS,
        )

    def _fidelity(self, answer: Answer, erased: bool) -> Fidelity:
        return Fidelity(
            compared_tokens=answer.comparison.positions,
            argmax_agreement=answer.comparison.argmax_agreement,
            mean_kl_to_merged=answer.comparison.mean_kl_to_trained,
            mean_kl_to_base=answer.comparison.mean_kl_to_base,
            sample_prompt=self._prompt[-SAMPLE_PROMPT_CHARACTERS:],
            sample_text=_printable(answer.sample_text),
            erased_tuning=erased,
        )


def texts_of(probes: "Sequence[Probe]", tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """The texts that a file must split into tokens exactly as the model's own tokenizer does."""
    known = tokenizer.get_vocab()
    marks = [f"{mark}user\nwhat is 1  +  1?{mark}\n" for mark in TURN_MARKS if mark in known]
    held_out = [text for probe in probes for text in (probe.prompt_text, str(tokenizer.decode(list(probe.input_ids))))]
    return [*HARD_TEXTS, *marks, *held_out]


def refuse_unfit(name: str, quantization: GgufQuantization, answer: Answer, token_ids: list[list[int]]) -> None:
    """Raises JobFailed when a file splits texts in another way, or keeps the weights and yet speaks differently."""
    found = answer.comparison
    different = sum(ours != theirs for ours, theirs in zip(token_ids, answer.token_ids, strict=True))
    if different:
        message = f"{name} splits {different} of {len(token_ids)} texts into other tokens than the model's tokenizer"
        raise JobFailed("export_failed", message, f"the base model needs a {SENTENCEPIECE} that fits its tokenizer.json")
    if quantization not in EXACT:
        return
    if found.argmax_agreement < EXACT_AGREEMENT or found.mean_kl_to_trained > EXACT_KL_NATS:
        message = (
            f"{name} does not speak like the trained model: they agree on {found.argmax_agreement:.1%} of "
            f"{found.positions} tokens, mean KL {found.mean_kl_to_trained:.4f} nats"
        )
        raise JobFailed("export_failed", message, _advice(quantization))


def erases_tuning(found: Comparison) -> bool:
    """Whether a file speaks more like the model before training than like the trained one."""
    if found.mean_kl_to_base is None or found.mean_kl_to_trained < NEGLIGIBLE_KL_NATS:
        return False
    return found.mean_kl_to_base < found.mean_kl_to_trained


def stage(whole: Path, sources: Sequence[Path], staging: Path) -> Path:
    """A copy of a model folder that llama.cpp's converter reads as it is meant.

    The converter takes the pieces from tokenizer.model, and what kind each one is from `added_tokens_decoder`, which
    transformers 5 no longer writes. Without it `<start_of_turn>` is an ordinary word, and llama.cpp takes it apart.
    """
    copy_files(whole, staging, [*MODEL_FILES, *weights(whole)])
    copy_tokenizer(whole, staging)
    sentencepiece = next((folder / SENTENCEPIECE for folder in sources if (folder / SENTENCEPIECE).is_file()), None)
    if sentencepiece is not None:
        link_or_copy(sentencepiece, staging / SENTENCEPIECE)
        path = staging / TOKENIZER_SETTINGS
        write_json(path, json.loads(path.read_text()) | {"added_tokens_decoder": _added_tokens(staging)})
    return staging


def _write_files(bench: "Bench", whole: Path) -> dict[GgufQuantization, Path]:
    """One file for each quantization, in the order asked for. Raises ProgramFailed."""
    import torch

    own, trained = precision(whole), bench.trained
    converted = bench.path(f"converted-{own}.gguf")
    staging = stage(whole, [trained.folder, trained.base_folder], bench.path("staging"))
    convert(staging, converted, precision=own, name=bench.model_name)
    files: dict[GgufQuantization, Path] = {}
    for quantization in bench.context.spec.training_config.export_config.gguf_quantizations:
        bench.context.check()
        files[quantization] = bench.path(f"{bench.model_name}-{quantization}.gguf")
        if quantization in ("none", own):
            link_or_copy(converted, files[quantization])
        else:
            quantize(converted, files[quantization], file_type=quantization, threads=torch.get_num_threads())
    converted.unlink()
    return files


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


def _printable(text: str) -> str:
    """A hardly trained model says anything, also what would move a terminal's cursor."""
    return "".join(character if character.isprintable() or character in "\n\t" else "\N{REPLACEMENT CHARACTER}" for character in text)


def _erased(name: str, found: Comparison) -> str:
    return (
        f"{name} speaks more like the base model (mean KL {found.mean_kl_to_base:.3f}) than like the trained one "
        f"({found.mean_kl_to_trained:.3f}): rounding has undone the training; use q8_0 or f16"
    )


def _advice(quantization: GgufQuantization) -> str:
    return "the log of the attempt has all that it said" if quantization in EXACT else "try gguf_quantization q8_0 or f16"
