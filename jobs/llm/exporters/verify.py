"""Hears a GGUF file out, in a process of its own, and decides whether it may go out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.llm.evaluation.generation import make_printable
from jobs.llm.exporters.log_probs import select_sample_prompt
from jobs.llm.exporters.merge import ReferenceLogProbs
from jobs.llm.llama_cpp.evaluate import EvalRequest, EvalResponse
from jobs.llm.llama_cpp.fidelity import Comparison
from jobs.llm.llama_cpp.runner import evaluate
from jobs.runtime.errors import JobFailed
from jobs.runtime.subprocesses import SubprocessFailed
from schema.job import Fidelity
from schema.training.export import GgufQuantization

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jobs.llm.exporters.workspace import ExportWorkspace
    from jobs.llm.trained_model import HeldOutExample

# Formats that keep the weights must speak like the model: the arithmetic alone differs (f16 1e-6 nats, bf16 5e-5 on Gemma 270M).
LOSSLESS_QUANTIZATIONS: tuple[GgufQuantization, ...] = ("none", "f32", "f16", "bf16")
MIN_LOSSLESS_AGREEMENT = 0.99
MAX_LOSSLESS_KL_NATS = 0.002
# Below this nobody can tell two models apart, and which of two others a file is nearer to means nothing.
NEGLIGIBLE_KL_NATS = 0.01

MAX_SAMPLE_TOKENS = 32
MAX_SAMPLE_PROMPT_CHARACTERS = 2000  # kept in the job's record

TURN_TOKENS = ("<start_of_turn>", "<end_of_turn>")
# What tokenizers get wrong: runs of spaces, tabs and line ends, other scripts, several code points in one picture.
TOKENIZER_EDGE_CASES = (
    "a  b   c    d        e                f                                 g",
    "    indented\n\t\ttwice\n\n\n\nfar   below  ",
    "Ünïcödé – 模型 – مرحبا – 👩‍🚀🙂",
)


@dataclass(frozen=True)
class ExportedFile:
    """A file to be heard: a model, or an adapter beside the base's file."""

    path: Path
    quantization: GgufQuantization
    base: Path | None = None  # of an adapter
    missing_weights: str = ""  # what of the training it cannot hold: then it is warned of and not refused
    imatrix: bool = False


class GgufVerifier:
    """Asks every file the same, and knows the answers of the trained model."""

    def __init__(self, workspace: "ExportWorkspace") -> None:
        self._workspace, tokenizer = workspace, workspace.tokenizer
        self._texts = tokenizer_test_texts(workspace.text_examples, tokenizer)
        self._token_ids = [tokenizer.encode(text, add_special_tokens=False) for text in self._texts]
        self.sample_prompt, self._prompt_ids = select_sample_prompt(workspace.text_examples, tokenizer)

    def verify(self, candidate: ExportedFile) -> Fidelity:
        """How the file speaks. Raises JobFailed when it does not, or not like the model it was made from."""
        name, quantization = candidate.path.name, candidate.quantization
        try:
            answer = evaluate(self._make_eval_request(candidate), self._workspace.folder)
        except SubprocessFailed as error:
            raise JobFailed("export_failed", f"{name} does not work in llama.cpp: {error}", _failure_hint(quantization)) from error
        check_fidelity(candidate, answer, self._token_ids)
        advice = make_advice(candidate, answer.comparison)
        if advice:
            self._workspace.context.warn("closer_to_base" if is_closer_to_base(answer.comparison) else "low_fidelity", advice)
        if not answer.sample_text.strip():
            self._workspace.context.warn("empty_generation", f"{name} ends its answer to a held-out prompt before the first word")
        return self._make_fidelity(candidate, answer, advice)

    @property
    def _reference_log_probs(self) -> ReferenceLogProbs:
        speech = self._workspace.merged_model.reference_log_probs
        if speech is None:
            raise JobFailed(
                "invalid_config", "a model that gives scores does not speak: llama.cpp cannot run it", "use export format merged"
            )
        return speech

    def _make_eval_request(self, candidate: ExportedFile) -> EvalRequest:
        import torch

        speech = self._reference_log_probs
        return EvalRequest(
            model_path=str(candidate.base or candidate.path),
            lora_path=str(candidate.path) if candidate.base else None,
            threads=torch.get_num_threads(),  # what the launcher allowed
            texts=self._texts,
            sample_prompt_ids=list(self._prompt_ids),
            max_sample_tokens=MAX_SAMPLE_TOKENS,
            **speech.request_fields(),
        )

    def _make_fidelity(self, candidate: ExportedFile, response: EvalResponse, advice: str) -> Fidelity:
        measured = make_fidelity(response.comparison)
        heard = {
            "sample_prompt": self.sample_prompt[-MAX_SAMPLE_PROMPT_CHARACTERS:],
            "sample_text": make_printable(response.sample_text),
            "closer_to_base": is_closer_to_base(response.comparison),
            "imatrix": candidate.imatrix,
            "advice": advice,
        }
        return measured.model_copy(update=heard)


def make_fidelity(comparison: Comparison) -> Fidelity:
    """The numbers of a comparison, as the job reports them."""
    return Fidelity(
        compared_tokens=comparison.positions,
        argmax_agreement=comparison.argmax_agreement,
        mean_kl_to_merged=comparison.mean_kl_to_trained,
        mean_kl_to_base=comparison.mean_kl_to_base,
        labeled_tokens=comparison.labeled_positions,
        perplexity=comparison.perplexity,
        perplexity_merged=comparison.perplexity_trained,
        perplexity_base=comparison.perplexity_base,
    )


def tokenizer_test_texts(examples: "Sequence[HeldOutExample]", tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """The texts that a file must split into tokens exactly as the model's own tokenizer does."""
    known = tokenizer.get_vocab()
    marks = [f"{mark}user\nwhat is 1  +  1?{mark}\n" for mark in TURN_TOKENS if mark in known]
    held_out = [text for probe in examples for text in (probe.prompt_text, str(tokenizer.decode(list(probe.input_ids))))]
    return [*TOKENIZER_EDGE_CASES, *marks, *held_out]


def check_fidelity(candidate: ExportedFile, response: EvalResponse, token_ids: list[list[int]]) -> None:
    """Raises JobFailed when a file splits texts in another way, or keeps the weights and yet speaks differently."""
    name, found = candidate.path.name, response.comparison
    different = sum(ours != theirs for ours, theirs in zip(token_ids, response.token_ids, strict=True))
    if different:
        message = f"{name} splits {different} of {len(token_ids)} texts into other tokens than the model's tokenizer"
        raise JobFailed("export_failed", message, "the base model needs a tokenizer.model that fits its tokenizer.json")
    if candidate.quantization in LOSSLESS_QUANTIZATIONS and not candidate.missing_weights and not is_within_tolerance(found):
        message = (
            f"{name} does not speak like the trained model: they agree on {found.argmax_agreement:.1%} of "
            f"{found.positions} tokens, mean KL {found.mean_kl_to_trained:.4f} nats"
        )
        raise JobFailed("export_failed", message, _failure_hint(candidate.quantization))


def make_advice(candidate: ExportedFile, comparison: Comparison) -> str:
    """What is amiss with a file that may go out all the same, and what would help; nothing where all is well."""
    name = candidate.path.name
    erased = is_closer_to_base(comparison)
    if candidate.missing_weights and not is_within_tolerance(comparison):
        distance = f"mean KL {comparison.mean_kl_to_trained:.3f} nats, agreement {comparison.argmax_agreement:.1%}"
        nearer = ", and is nearer to the base" if erased else ""
        return f"{name} lacks {candidate.missing_weights}: it does not speak like the trained model ({distance}){nearer}; use include_gguf"
    if not erased:
        return ""
    finer = "use q8_0 or f16" if candidate.imatrix else "use q8_0 or f16, or an importance matrix (gguf_imatrix)"
    return (
        f"{name} speaks more like the base model (mean KL {comparison.mean_kl_to_base:.3f}) than like the trained one "
        f"({comparison.mean_kl_to_trained:.3f}): rounding has undone the training; {finer}"
    )


def is_within_tolerance(comparison: Comparison) -> bool:
    """Whether nothing but arithmetic lies between a file and the trained model."""
    return comparison.argmax_agreement >= MIN_LOSSLESS_AGREEMENT and comparison.mean_kl_to_trained <= MAX_LOSSLESS_KL_NATS


def is_closer_to_base(comparison: Comparison) -> bool:
    """Whether a file speaks more like the model before training than like the trained one."""
    if comparison.mean_kl_to_base is None or comparison.mean_kl_to_trained < NEGLIGIBLE_KL_NATS:
        return False
    return comparison.mean_kl_to_base < comparison.mean_kl_to_trained


def _failure_hint(quantization: GgufQuantization) -> str:
    return "the log of the attempt has all that it said" if quantization in LOSSLESS_QUANTIZATIONS else "try gguf_quantization q8_0 or f16"
