"""Converts a staged model folder to GGUF so that llama.cpp begins a text, and ends an answer, as the training's rows do."""

from pathlib import Path
from typing import TYPE_CHECKING

from jobs.llm.exporters.model_files import Precision
from jobs.llm.llama_cpp.runner import convert, read_vocabulary
from jobs.llm.llama_cpp.vocabulary import MAX_END_TOKENS, VocabularySettings, VocabularyTexts

if TYPE_CHECKING:
    from jobs.llm.exporters.workspace import ExportWorkspace


def convert_model(workspace: "ExportWorkspace", staging: Path, target: Path, precision: Precision) -> None:
    """Write the file. llama.cpp knows the end tokens of common models by their text, and others by the file's settings.

    Raises SubprocessFailed. A file with more unknown end tokens than a file can name is written without them, and fails its verification.
    """
    settings = VocabularySettings(adds_bos=workspace.adds_bos)
    convert(staging, target, precision=precision, name=workspace.model_name, vocabulary=settings)
    asked = VocabularyTexts(texts=[], stop_token_ids=list(workspace.trained.chat_format.stop_token_ids))
    missing = read_vocabulary(target, asked, workspace.folder).missing_stops
    if 0 < len(missing) <= MAX_END_TOKENS:
        tokens = [str(workspace.tokenizer.convert_ids_to_tokens(token)) for token in missing]
        workspace.context.log_decision("gguf_end_tokens", " ".join(tokens), "llama.cpp does not know that they end an answer")
        settings = settings.model_copy(update={"end_token_ids": missing})
        convert(staging, target, precision=precision, name=workspace.model_name, vocabulary=settings)
