"""Hears a GGUF file out, in a process of its own, and decides whether it may go out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.errors import JobFailed
from jobs.exporters.merge import Speech
from jobs.exporters.speech import sample_of
from jobs.llama.apart import ProgramFailed, evaluate
from jobs.llama.evaluate import Answer, Question
from jobs.llama.fidelity import Comparison
from schema.export import GgufQuantization
from schema.job import Fidelity

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

TURN_MARKS = ("<start_of_turn>", "<end_of_turn>")
# What tokenizers get wrong: runs of spaces, tabs and line ends, other scripts, several code points in one picture.
HARD_TEXTS = (
    "a  b   c    d        e                f                                 g",
    "    indented\n\t\ttwice\n\n\n\nfar   below  ",
    "Ünïcödé – 模型 – مرحبا – 👩‍🚀🙂",
)


@dataclass(frozen=True)
class Candidate:
    """A file to be heard: a model, or an adapter beside the base's file."""

    path: Path
    quantization: GgufQuantization
    base: Path | None = None  # of an adapter
    lacks: str = ""  # what of the training it cannot hold: then it is warned of and not refused
    imatrix: bool = False


class Examiner:
    """Asks every file the same, and knows the answers of the trained model."""

    def __init__(self, bench: "Bench") -> None:
        self._bench, tokenizer = bench, bench.tokenizer
        self._texts = texts_of(bench.probes, tokenizer)
        self._token_ids = [tokenizer.encode(text, add_special_tokens=False) for text in self._texts]
        self.prompt, self._prompt_ids = sample_of(bench.probes, tokenizer)

    def examine(self, candidate: Candidate) -> Fidelity:
        """How the file speaks. Raises JobFailed when it does not, or not like the model it was made from."""
        name, quantization = candidate.path.name, candidate.quantization
        try:
            answer = evaluate(self._question(candidate), self._bench.folder)
        except ProgramFailed as error:
            raise JobFailed("export_failed", f"{name} does not work in llama.cpp: {error}", _advice(quantization)) from error
        refuse_unfit(candidate, answer, self._token_ids)
        advice = advice_on(candidate, answer.comparison)
        if advice:
            self._bench.context.warn("erased_tuning" if erases_tuning(answer.comparison) else "unlike_the_model", advice)
        if not answer.sample_text.strip():
            self._bench.context.warn("silent_model", f"{name} ends its answer to a held-out prompt before the first word")
        return self._fidelity(candidate, answer, advice)

    @property
    def _speech(self) -> Speech:
        speech = self._bench.whole.speech
        if speech is None:
            raise JobFailed(
                "invalid_config", "a model that gives scores does not speak: llama.cpp cannot run it", "use export format merged"
            )
        return speech

    def _question(self, candidate: Candidate) -> Question:
        import torch

        speech = self._speech
        return Question(
            file=str(candidate.base or candidate.path),
            lora=str(candidate.path) if candidate.base else None,
            threads=torch.get_num_threads(),  # what the launcher allowed
            texts=self._texts,
            passages=list(speech.passages),
            trained_log_probs=str(speech.log_probs),
            base_log_probs=str(speech.base_log_probs) if speech.base_log_probs else None,
            sample_ids=list(self._prompt_ids),
            sample_tokens=SAMPLE_TOKENS,
        )

    def _fidelity(self, candidate: Candidate, answer: Answer, advice: str) -> Fidelity:
        measured = fidelity_of(answer.comparison)
        heard = {
            "sample_prompt": self.prompt[-SAMPLE_PROMPT_CHARACTERS:],
            "sample_text": _printable(answer.sample_text),
            "erased_tuning": erases_tuning(answer.comparison),
            "imatrix": candidate.imatrix,
            "advice": advice,
        }
        return measured.model_copy(update=heard)


def fidelity_of(found: Comparison) -> Fidelity:
    """The numbers of a comparison, as the job reports them."""
    return Fidelity(
        compared_tokens=found.positions,
        argmax_agreement=found.argmax_agreement,
        mean_kl_to_merged=found.mean_kl_to_trained,
        mean_kl_to_base=found.mean_kl_to_base,
        labelled_tokens=found.labelled,
        perplexity=found.perplexity,
        perplexity_merged=found.perplexity_trained,
        perplexity_base=found.perplexity_base,
    )


def texts_of(probes: "Sequence[Probe]", tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """The texts that a file must split into tokens exactly as the model's own tokenizer does."""
    known = tokenizer.get_vocab()
    marks = [f"{mark}user\nwhat is 1  +  1?{mark}\n" for mark in TURN_MARKS if mark in known]
    held_out = [text for probe in probes for text in (probe.prompt_text, str(tokenizer.decode(list(probe.input_ids))))]
    return [*HARD_TEXTS, *marks, *held_out]


def refuse_unfit(candidate: Candidate, answer: Answer, token_ids: list[list[int]]) -> None:
    """Raises JobFailed when a file splits texts in another way, or keeps the weights and yet speaks differently."""
    name, found = candidate.path.name, answer.comparison
    different = sum(ours != theirs for ours, theirs in zip(token_ids, answer.token_ids, strict=True))
    if different:
        message = f"{name} splits {different} of {len(token_ids)} texts into other tokens than the model's tokenizer"
        raise JobFailed("export_failed", message, "the base model needs a tokenizer.model that fits its tokenizer.json")
    if candidate.quantization in EXACT and not candidate.lacks and not speaks_alike(found):
        message = (
            f"{name} does not speak like the trained model: they agree on {found.argmax_agreement:.1%} of "
            f"{found.positions} tokens, mean KL {found.mean_kl_to_trained:.4f} nats"
        )
        raise JobFailed("export_failed", message, _advice(candidate.quantization))


def advice_on(candidate: Candidate, found: Comparison) -> str:
    """What is amiss with a file that may go out all the same, and what would help; nothing where all is well."""
    name = candidate.path.name
    erased = erases_tuning(found)
    if candidate.lacks and not speaks_alike(found):
        distance = f"mean KL {found.mean_kl_to_trained:.3f} nats, agreement {found.argmax_agreement:.1%}"
        nearer = ", and is nearer to the base" if erased else ""
        return f"{name} lacks {candidate.lacks}: it does not speak like the trained model ({distance}){nearer}; use include_gguf"
    if not erased:
        return ""
    finer = "use q8_0 or f16" if candidate.imatrix else "use q8_0 or f16, or an importance matrix (gguf_imatrix)"
    return (
        f"{name} speaks more like the base model (mean KL {found.mean_kl_to_base:.3f}) than like the trained one "
        f"({found.mean_kl_to_trained:.3f}): rounding has undone the training; {finer}"
    )


def speaks_alike(found: Comparison) -> bool:
    """Whether nothing but arithmetic lies between a file and the trained model."""
    return found.argmax_agreement >= EXACT_AGREEMENT and found.mean_kl_to_trained <= EXACT_KL_NATS


def erases_tuning(found: Comparison) -> bool:
    """Whether a file speaks more like the model before training than like the trained one."""
    if found.mean_kl_to_base is None or found.mean_kl_to_trained < NEGLIGIBLE_KL_NATS:
        return False
    return found.mean_kl_to_base < found.mean_kl_to_trained


def _printable(text: str) -> str:
    """A hardly trained model says anything, also what would move a terminal's cursor."""
    return "".join(character if character.isprintable() or character in "\n\t" else "\N{REPLACEMENT CHARACTER}" for character in text)


def _advice(quantization: GgufQuantization) -> str:
    return "the log of the attempt has all that it said" if quantization in EXACT else "try gguf_quantization q8_0 or f16"
