"""The corpus: files as people send them, broken and unusual ones, and what Tunesmith must say about each.

`corpus/` has the files, `corpus.json` the cases: a file, the options that it is sent with, and what is expected. `make_corpus.py` makes
those that are too large or too hostile to be kept. `docs/datasets-corpus.md` compares the answers with those of other loaders.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from schema.ingestion import IngestLimits, IngestOptions, IngestTask, InputFile

FOLDER = Path(__file__).parent
FILES = FOLDER / "corpus"


@dataclass(frozen=True)
class Case:
    """A file, how it is sent, and what is expected."""

    name: str
    about: str
    file: str
    expect: dict[str, Any]
    group: str
    is_generated: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    limits: dict[str, Any] = field(default_factory=dict)

    def make_task(self, output: Path, generated: Path) -> IngestTask:
        """The task that ingests the file into an empty folder; generated files are in `generated`."""
        path = (generated if self.is_generated else FILES) / self.file
        return IngestTask(
            files=(InputFile(path=str(path), name=self.file),),
            options=IngestOptions.model_validate({"eval_fraction": 0.0, **self.options}),
            limits=IngestLimits.model_validate(self.limits),
            output=str(output),
        )


def load_cases() -> list[Case]:
    """All cases, in the order of the page."""
    return [Case(**case) for case in json.loads((FOLDER / "corpus.json").read_text())]
