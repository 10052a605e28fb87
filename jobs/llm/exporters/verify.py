"""Runs a GGUF file in a child process, compares it with the trained model, and decides whether it may be uploaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.llm.evaluation.generation import make_printable
from jobs.llm.exporters.log_probs import GreedyAnswer
from jobs.llm.exporters.user_path import find_gguf_problem, make_gguf_questions
from jobs.llm.llama_cpp.evaluate import EvalRequest, EvalResponse
from jobs.llm.llama_cpp.fidelity import TIE_NATS, Comparison
from jobs.llm.llama_cpp.runner import evaluate
from jobs.runtime.errors import JobFailed
from jobs.runtime.subprocesses import SubprocessFailed
from schema.training.llm_export import GgufQuantization
from schema.training.llm_fidelity import Fidelity

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jobs.llm.exporters.workspace import ExportWorkspace
    from jobs.llm.trained_model import HeldOutExample

# Formats without quantization must match the model: only the arithmetic differs (f16 1e-6 nats, bf16 5e-5 on Gemma 270M).
LOSSLESS_QUANTIZATIONS: tuple[GgufQuantization, ...] = ("none", "f32", "f16", "bf16")
MIN_LOSSLESS_AGREEMENT = 0.99
MAX_LOSSLESS_KL_NATS = 0.002
# Below this two models are indistinguishable, so which of the two a file is closer to means nothing.
NEGLIGIBLE_KL_NATS = 0.01

VOCABULARY_HINT = "llama.cpp reads this tokenizer or chat template differently; use export format merged, without include_gguf"
MAX_SAMPLE_TOKENS = 32
MAX_SAMPLE_PROMPT_CHARACTERS = 2000  # stored in the job's record

# What converted tokenizers get wrong: runs of spaces, tabs and newlines, non-Latin scripts, emoji of several code points.
TOKENIZER_EDGE_CASES = (
    "a  b   c    d        e                f                                 g",
    "    indented\n\t\ttwice\n\n\n\nfar   below  ",
    "Ünïcödé – 模型 – مرحبا – 👩‍🚀🙂",
)


@dataclass(frozen=True)
class ExportedFile:
    """A GGUF file to verify: a model, or an adapter with its base's file."""

    path: Path
    quantization: GgufQuantization
    base: Path | None = None  # the base model's GGUF file, for an adapter
    missing_weights: str = ""  # trained weights that the format cannot hold, in words; such a file gets a warning, not an error
    imatrix: bool = False
    too_coarse: bool = False  # this precision rounds the merged model, which is in a finer one

    @property
    def must_match(self) -> bool:
        """Whether the file holds every trained weight as it is, so that only the arithmetic may differ."""
        return self.quantization in LOSSLESS_QUANTIZATIONS and not self.missing_weights and not self.too_coarse


class GgufVerifier:
    """Verifies every file of one job with the same texts, passages and prompt."""

    def __init__(self, workspace: "ExportWorkspace") -> None:
        self._workspace, trained = workspace, workspace.trained
        texts = tokenizer_test_texts(workspace.text_examples, workspace.tokenizer, trained.chat_format.turn_token_ids)
        self._questions = make_gguf_questions(
            workspace.tokenizer, trained.chat_format, texts, trained.user_prompts, workspace.ollama_template
        )
        self.sample_prompt, self._prompt_ids = workspace.sample_prompt

    def verify(self, candidate: ExportedFile) -> Fidelity:
        """Measure the file's fidelity. Raises JobFailed when llama.cpp cannot run it, or a lossless file differs from the model."""
        import torch

        name, context = candidate.path.name, self._workspace.context
        reference = self._workspace.merged_model.reference_log_probs
        if reference is None:
            raise JobFailed("invalid_config", "llama.cpp cannot run a reward model", "use export format merged")
        request = EvalRequest(
            model_path=str(candidate.base or candidate.path),
            lora_path=str(candidate.path) if candidate.base else None,
            threads=torch.get_num_threads(),  # the launcher's limit
            vocabulary=self._questions.request(),
            sample_prompt_ids=list(self._prompt_ids),
            max_sample_tokens=MAX_SAMPLE_TOKENS,
            **reference.request_fields(),
        )
        try:
            response = evaluate(request, self._workspace.folder)
        except SubprocessFailed as error:
            raise JobFailed("export_failed", f"llama.cpp cannot run {name}: {error}", _failure_hint(candidate.quantization)) from error
        problem = find_gguf_problem(self._questions, response.vocabulary, lambda token: str(self._workspace.tokenizer.decode([token])))
        if problem:
            raise JobFailed("export_failed", f"{name} {problem}", VOCABULARY_HINT)
        check_fidelity(candidate, response, reference.answer)
        closer_to_base, advice = is_closer_to_base(response.comparison), make_advice(candidate, response.comparison)
        if advice:
            context.warn("closer_to_base" if closer_to_base else "low_fidelity", advice)
        if not response.sample_text.strip():
            context.warn("empty_generation", f"{name} generates no text for a held-out prompt: its first token ends the answer")
        measured = {
            "sample_prompt": self.sample_prompt[-MAX_SAMPLE_PROMPT_CHARACTERS:],
            "sample_text": make_printable(response.sample_text),
            "closer_to_base": closer_to_base,
            "imatrix": candidate.imatrix,
            "advice": advice,
        }
        return make_fidelity(response.comparison).model_copy(update=measured)


def make_fidelity(comparison: Comparison) -> Fidelity:
    """A comparison's numbers in the API's form."""
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


def tokenizer_test_texts(
    examples: "Sequence[HeldOutExample]", tokenizer: "PreTrainedTokenizerBase", turn_token_ids: Sequence[int]
) -> list[str]:
    """Texts that a file must split into exactly the tokens of the model's own tokenizer."""
    turn_tokens = [str(tokenizer.convert_ids_to_tokens(token)) for token in turn_token_ids]
    turns = [f"{token}user\nwhat is 1  +  1?{token}\n" for token in turn_tokens]
    held_out = [text for example in examples for text in (example.prompt_text, str(tokenizer.decode(list(example.input_ids))))]
    return [*TOKENIZER_EDGE_CASES, *turns, *held_out]


def check_fidelity(candidate: ExportedFile, response: EvalResponse, answer: GreedyAnswer) -> None:
    """Raise JobFailed when a file is lossless and its predictions differ from the merged model's, whose answer is `answer`."""
    name, comparison = candidate.path.name, response.comparison
    if not candidate.must_match:
        return
    if not is_within_tolerance(comparison):
        message = (
            f"{name}'s predictions differ from the trained model's: they agree on {comparison.argmax_agreement:.1%} of "
            f"{comparison.positions} tokens, mean KL {comparison.mean_kl_to_trained:.4f} nats"
        )
        raise JobFailed("export_failed", message, _mismatch_hint(candidate))
    # Two tokens' difference may change by twice what one of them may.
    position = answer.find_difference(response.sample_ids, max(TIE_NATS, 2 * comparison.max_difference_nats))
    if position is not None:
        message = f"{name} answers a held-out prompt in other words than the trained model, from token {position + 1} on"
        raise JobFailed("export_failed", message, _mismatch_hint(candidate))


def make_advice(candidate: ExportedFile, comparison: Comparison) -> str:
    """What reduces the quality of a file that is uploaded anyway, and what to use instead; empty for a good file."""
    name, closer_to_base = candidate.path.name, is_closer_to_base(comparison)
    if candidate.missing_weights and not is_within_tolerance(comparison):
        numbers = f"mean KL {comparison.mean_kl_to_trained:.3f} nats, agreement {comparison.argmax_agreement:.1%}"
        closer = ", and it is closer to the base model" if closer_to_base else ""
        return f"{name} lacks {candidate.missing_weights}, so it differs from the trained model ({numbers}){closer}; use include_gguf"
    if candidate.too_coarse and not is_within_tolerance(comparison):
        return (
            f"{name} rounds off some of the training (mean KL {comparison.mean_kl_to_trained:.4f} nats); use gguf_quantization f32 or none"
        )
    if not closer_to_base:
        return ""
    alternative = "use q8_0 or f16" if candidate.imatrix else "use q8_0 or f16, or an importance matrix (gguf_imatrix)"
    return (
        f"{name} is closer to the base model (mean KL {comparison.mean_kl_to_base:.3f}) than to the trained model "
        f"({comparison.mean_kl_to_trained:.3f}): quantization removed the training; {alternative}"
    )


def is_within_tolerance(comparison: Comparison) -> bool:
    """Whether a file differs from the trained model by arithmetic alone."""
    return comparison.argmax_agreement >= MIN_LOSSLESS_AGREEMENT and comparison.mean_kl_to_trained <= MAX_LOSSLESS_KL_NATS


def is_closer_to_base(comparison: Comparison) -> bool:
    """Whether a file's predictions are closer to the base model's than to the trained model's."""
    if comparison.mean_kl_to_base is None or comparison.mean_kl_to_trained < NEGLIGIBLE_KL_NATS:
        return False
    return comparison.mean_kl_to_base < comparison.mean_kl_to_trained


def _mismatch_hint(candidate: ExportedFile) -> str:
    setting = "include_lora_gguf" if candidate.base else "include_gguf"
    return f"leave {setting} out; please report this with the job's log"


def _failure_hint(quantization: GgufQuantization) -> str:
    return "the attempt's log has the program's output" if quantization in LOSSLESS_QUANTIZATIONS else "try gguf_quantization q8_0 or f16"
