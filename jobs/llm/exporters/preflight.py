"""Tries what the export of the trained model needs, so that nothing fails after the compute is paid.

prompts       the chat template asks the prompts of some rows as the rows are trained
disk          the exported files fit
architecture  llama.cpp's converter knows the model
vocabulary    the converter converts the training's tokenizer, and llama.cpp makes the same tokens of texts and prompts with it
adapter       the converter writes an adapter with the trained layers

The last two take llama.cpp's programs some seconds. They run beside the first steps, and their failure stops the training at the next
step; no checkpoint is saved before they are done.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.llm.exporters.lora_gguf import stage_adapter
from jobs.llm.exporters.model_files import list_weight_files, read_precision
from jobs.llm.exporters.modelfile import make_ollama_template
from jobs.llm.exporters.staging import make_staging_folder
from jobs.llm.exporters.tensor_merge import make_weightless_model, read_header
from jobs.llm.exporters.user_path import (
    GgufQuestions,
    check_tokenizer_path,
    find_gguf_problem,
    make_gguf_questions,
    rows_begin_with_bos,
)
from jobs.llm.exporters.verify import tokenizer_test_texts
from jobs.llm.llama_cpp import list_convertible_architectures
from jobs.llm.llama_cpp.runner import convert_lora, convert_vocabulary, read_vocabulary
from jobs.llm.llama_cpp.vocabulary import MAX_END_TOKENS, VocabularyReport, VocabularySettings
from jobs.llm.model import lora_config
from jobs.runtime.background_task import BackgroundTask
from jobs.runtime.errors import JobFailed
from jobs.runtime.subprocesses import SubprocessFailed
from schema.estimate.disk import estimate_export_bytes

if TYPE_CHECKING:
    from jobs.llm.trained_model import UserPrompt
    from jobs.llm.training_context import TrainingContext

PRECISION_BYTES = {"f32": 4, "f16": 2, "bf16": 2, "fp32": 4, "fp16": 2}
GGUF_HINT = "leave include_gguf and include_lora_gguf out; export format 'merged' needs no conversion"
ADAPTER_HINT = "leave include_lora_gguf out, or name other target_modules; include_gguf writes the whole model"


def start_export_check(training: "TrainingContext", prompts: "tuple[UserPrompt, ...]") -> BackgroundTask[None] | None:
    """Raise JobFailed `invalid_config` for an export that would fail, now or where the caller waits for the returned task.

    A resumed training skips the check, as an earlier attempt did it.
    """
    if training.resume_checkpoint is not None:
        return None
    check_tokenizer_path(training.tokenizer, training.chat_format, prompts, "the chat template", "invalid_config")
    _check_disk(training)
    export = training.config.export_config
    if not export.include_gguf and not export.include_lora_gguf:
        return None
    trial = _prepare_gguf_trial(training, prompts)
    return BackgroundTask("export-check", trial.run)


def read_architecture(base_folder: Path) -> str:
    """The name by which llama.cpp's converter chooses how to convert the language part of a model; empty if the config has none."""
    config: dict[str, Any] = json.loads((base_folder / "config.json").read_text())  # Any: JSON
    names = config.get("text_config", {}).get("architectures") or config.get("architectures") or [""]
    return str(names[0])


def _check_disk(training: "TrainingContext") -> None:
    config, base = training.config, training.base_folder
    export, kinds = config.export_config, config.export_formats
    parameters = sum(prod(tensor.shape) for name in list_weight_files(base) for tensor in read_header(base / name))
    needed = estimate_export_bytes(
        parameters,
        merged_bytes_per_parameter=PRECISION_BYTES[export.merged_dtype or read_precision(base)],
        makes_merged=bool({"merged", "onnx"} & set(kinds)) or export.include_gguf or export.include_lora_gguf,
        quantizations=export.gguf_quantizations,
        makes_onnx="onnx" in kinds,
    )
    free = shutil.disk_usage(training.context.workdir).free
    if needed > free:
        message = f"the requested exports take about {needed / 1e9:.1f} GB of disk, and {free / 1e9:.1f} GB are free"
        raise JobFailed("invalid_config", message, "request fewer gguf_quantization or format entries, or a profile with a larger disk")


@dataclass(frozen=True)
class _GgufTrial:
    """What llama.cpp's programs are tried with. The main thread made all that needs a library, because it goes on to use them."""

    base: Path
    folder: Path  # with the tokenizer; deleted afterwards
    settings: VocabularySettings
    questions: GgufQuestions
    adapter: Path | None  # to convert
    decode: Callable[[int], str]

    def run(self) -> None:
        """Convert the vocabulary and the adapter. Raises JobFailed."""
        tokenizer = self.folder / "tokenizer"
        try:
            staging = make_staging_folder(self.base, tokenizer, [tokenizer, self.base], self.folder / "staging")
            self._try_vocabulary(staging)
            self._try_adapter(staging)
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _try_vocabulary(self, staging: Path) -> None:
        try:
            problem = find_gguf_problem(self.questions, self._read_converted_vocabulary(staging), self.decode)
        except SubprocessFailed as error:
            raise JobFailed("invalid_config", f"llama.cpp cannot use the tokenizer of this base model: {error}", GGUF_HINT) from error
        if problem:
            raise JobFailed("invalid_config", f"a GGUF file of this model {problem}", GGUF_HINT)

    def _read_converted_vocabulary(self, staging: Path) -> VocabularyReport:
        path, asked = self.folder / "vocabulary.gguf", self.questions.request()
        convert_vocabulary(staging, path, self.settings)
        report = read_vocabulary(path, asked, self.folder)
        if 0 < len(report.missing_stops) <= MAX_END_TOKENS:
            convert_vocabulary(staging, path, self.settings.model_copy(update={"end_token_ids": report.missing_stops}))
            report = read_vocabulary(path, asked, self.folder)
        return report

    def _try_adapter(self, staging: Path) -> None:
        if self.adapter is None:
            return
        try:
            convert_lora(self.adapter, staging, self.folder / "adapter.gguf")
        except SubprocessFailed as error:
            raise JobFailed("invalid_config", f"llama.cpp's converter cannot write the adapter: {error}", ADAPTER_HINT) from error


def _prepare_gguf_trial(training: "TrainingContext", prompts: "tuple[UserPrompt, ...]") -> _GgufTrial:
    """The inputs of llama.cpp's programs. Raises JobFailed for an architecture that they do not know."""
    base, tokenizer, chat_format = training.base_folder, training.tokenizer, training.chat_format
    architecture = read_architecture(base)
    if architecture not in list_convertible_architectures("TEXT"):
        message = f"llama.cpp's converter does not know the architecture {architecture or 'of this base model'}"
        raise JobFailed("invalid_config", message, GGUF_HINT)
    folder = training.context.workdir / "export-plan"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tokenizer.save_pretrained(folder / "tokenizer")
    template = make_ollama_template(chat_format, tokenizer, prompts)
    texts = tokenizer_test_texts((), tokenizer, chat_format.turn_token_ids)
    return _GgufTrial(
        base=base,
        folder=folder,
        settings=VocabularySettings(adds_bos=rows_begin_with_bos(tokenizer, [prompt.input_ids for prompt in prompts])),
        questions=make_gguf_questions(tokenizer, chat_format, texts, prompts, template),
        adapter=_make_untrained_adapter(training, folder) if training.config.export_config.include_lora_gguf else None,
        decode=lambda token: str(tokenizer.decode([token])),
    )


def _make_untrained_adapter(training: "TrainingContext", folder: Path) -> Path:
    """A staged adapter of rank 1 with the layers to train, on a base without weights. Raises JobFailed."""
    from peft import get_peft_model

    hyperparameters = training.config.hyperparameters.model_copy(update={"lora_rank": 1})
    model = make_weightless_model(training.base_folder, "image_text" if training.config.modality == "vision" else "causal")
    peft_config = lora_config(training.config.model_copy(update={"hyperparameters": hyperparameters}), model)
    peft_config.init_lora_weights = True  # others read the base's weights
    get_peft_model(model, peft_config).save_pretrained(folder / "adapter")
    adapter, _ = stage_adapter(folder / "adapter", folder / "adapter-staging")
    return adapter
