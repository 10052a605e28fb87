"""`python -m bench.corpus --llama-factory PYTHON > docs/datasets-corpus.md`: what Tunesmith and others say about the files of the corpus.

`datasets` is loaded in the trainer's environment, LLaMA-Factory in an environment of its own that has it: see the end of the page.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from schema.ingestion import IngestOutcome, IngestTask
from tests.data import FILES, Case, load_cases

SOURCE = Path(__file__).resolve().parents[1]
DATA_PYTHON = SOURCE / ".venvs/data/bin/python"
LLM_PYTHON = SOURCE / ".venvs/llm/bin/python"
MEMORY_BYTES = 1536 << 20  # of one of our processes, as on Cloud Run
TIME_LIMIT_S = 60
MAX_CELL_CHARS = 150
MAX_SHOWN_CHARS = 40  # of a text that another loader loses
ROLES = {"system", "user", "assistant", "tool", "developer"}

Answer = dict[str, Any]


def main() -> None:
    """Load every file with each loader, and print the page."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.corpus", description="Compare loaders on the corpus of broken and unusual files."
    )
    parser.add_argument("--llama-factory", type=Path, required=True, metavar="PYTHON", help="the Python of an environment that has it")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the answers there, and use those that it has")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "files")
        files.mkdir()
        subprocess.run([DATA_PYTHON, "-m", "tests.data.make_corpus", files], cwd=SOURCE, env=_environment(), check=True)
        cases = load_cases()
        ours = {case.name: _ingest(case, files) for case in cases}
        for path in FILES.iterdir():
            (files / path.name).write_bytes(path.read_bytes())
        keep = args.keep or Path(folder)
        datasets = _load("datasets", LLM_PYTHON, files, keep)
        llama_factory = _load("llama_factory", args.llama_factory, files, keep)
    print("\n".join(render_page(cases, ours, datasets, llama_factory)))


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path, "PYTHONUTF8": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def _ingest(case: Case, generated: Path) -> tuple[IngestOutcome, list[Answer]]:
    """The outcome for a file, in a process of its own, and the rows that are kept."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "out")
        output.mkdir()
        task: IngestTask = case.make_task(output, generated)
        task = task.model_copy(update={"limits": task.limits.model_copy(update={"max_memory_bytes": MEMORY_BYTES})})
        task_file = Path(folder, "task.json")
        task_file.write_text(task.model_dump_json())
        command = [DATA_PYTHON, "-m", "jobs.ingest", task_file]
        subprocess.run(command, cwd=SOURCE, env=_environment(), stdout=subprocess.DEVNULL, timeout=TIME_LIMIT_S, check=True)
        outcome = IngestOutcome.load((output / "outcome.json").read_bytes())
        splits = outcome.rows.splits.values() if outcome.rows else ()
        return outcome, [json.loads(line) for split in splits for line in (output / split.file).read_bytes().split(b"\n") if line]


def _load(loader: str, python: Path, files: Path, keep: Path) -> dict[str, Answer]:
    """The answers of another loader, by file."""
    answers = keep / f"{loader}.json"
    if not answers.exists():
        command = [python, "-m", "bench.corpus_loaders", loader, files, answers]
        variables = _environment() | {"DISABLE_VERSION_CHECK": "1"}  # of LLaMA-Factory: it wants an older transformers
        subprocess.run(command, cwd=SOURCE, env=variables, stdout=subprocess.DEVNULL, check=True)
    return json.loads(answers.read_text())


# --- the page -----------------------------------------------------------------------------------------------------------

HEADER = """# A corpus of broken and unusual files

<!-- written by `python -m bench.corpus`; do not edit -->

`tests/data/corpus` has {files} files as people send them, and `tests/data/make_corpus.py` makes {generated} more that are too large or too
hostile to be kept. `tests/data/corpus.json` says what Tunesmith must report about each, and `tests/ingest/test_corpus.py` checks it, byte
for byte where rows are listed. Below is what it reports, and what `datasets` {version} (`load_dataset` on the file as it is) and
LLaMA-Factory 0.9.5 (its loader and converter, with a `dataset_info.json` that names the columns as a person who knows the file
would) make of it.

| | Tunesmith | `datasets` | LLaMA-Factory |
|---|---|---|---|
"""

FOOTER = """
"Not noticed" means that the loader returns the rows, faulty ones among them, and says nothing. Neither `datasets` nor LLaMA-Factory
promises to find such faults: `datasets` reads files and knows no conversations, and LLaMA-Factory drops a conversation that it cannot use
with a line in the log. What is not noticed here is found later, when a GPU is rented, or never.

LLaMA-Factory runs here with the newest `datasets` that it accepts (4.0.0) and, because this project has no older one, with transformers
5.23: its check of versions is off, and its import of torchaudio, which it uses for sound only, gets an empty module. Its loader and
converters use neither. Each file is loaded in a process of its own that may take 60 seconds and address 16 GB. To repeat it: install
`llamafactory==0.9.5`, `omegaconf` and `datasets==4.0.0` without dependencies into a folder, and put that folder before the packages of the
trainer's environment.
"""


def render_page(
    cases: list[Case], ours: dict[str, tuple[IngestOutcome, list[Answer]]], datasets: dict[str, Answer], llama_factory: dict[str, Answer]
) -> Iterator[str]:
    """The lines of the page."""
    plain = [case for case in cases if not case.options or case.options.keys() <= {"eval_fraction"}]
    version = next(answer["version"] for answer in datasets.values() if "version" in answer)
    generated = {case.file for case in cases if case.is_generated}
    yield HEADER.format(files=len({case.file for case in cases} - generated), generated=len(generated), version=version).rstrip("\n")
    others = [{case.name: judge(case, *ours[case.name], answers[case.file]) for case in plain} for answers in (datasets, llama_factory)]
    yield from _render_counts(plain, ours, others)
    group = ""
    for case in cases:
        if case.group != group:
            group = case.group
            yield from ("", f"## {group}", "", "| file | what it is | Tunesmith | `datasets` | LLaMA-Factory |", "|---|---|---|---|---|")
        verdicts = [judged[case.name][1] if case.name in judged else "" for judged in others]
        yield "| " + " | ".join(map(_cell, [f"`{case.name}`", case.about, describe(*ours[case.name]), *verdicts])) + " |"
    yield FOOTER.rstrip("\n")


def _render_counts(
    cases: list[Case], ours: dict[str, tuple[IngestOutcome, list[Answer]]], others: list[dict[str, tuple[str, str]]]
) -> Iterator[str]:
    faulty = [case.name for case in cases if _is_faulty(case)]
    sound = [case.name for case in cases if not _is_faulty(case)]
    counts = [Counter(judged[name][0] for name in faulty) for judged in others]
    named = sum(ours[name][0].rows is None for name in faulty)
    rows = [
        (f"of {len(faulty)} faulty files: fault named", str(named), *("" for _ in others)),
        ("of these: an error of some kind", "", *(str(count["error"]) for count in counts)),
        ("of these: rows dropped with a line in the log", "", *(str(count["dropped"]) for count in counts)),
        ("of these: not noticed", str(len(faulty) - named), *(str(count["silent"]) for count in counts)),
    ]
    counts = [Counter(judged[name][0] for name in sound) for judged in others]
    kept = sum(ours[name][0].rows is not None for name in sound)
    rows += [
        (f"of {len(sound)} sound files: read as they are", str(kept), *(str(count["same"]) for count in counts)),
        ("of these: rows changed, lost or added", "0", *(str(count["changed"] + count["dropped"]) for count in counts)),
        ("of these: not read", str(len(sound) - kept), *(str(count["error"]) for count in counts)),
    ]
    yield from ("| " + " | ".join(row) + " |" for row in rows)


def _is_faulty(case: Case) -> bool:
    return "refused" in case.expect or "problems" in case.expect


def describe(outcome: IngestOutcome, rows: list[Answer]) -> str:
    """What Tunesmith reports, in a line."""
    if outcome.refused:
        return f"refused: {outcome.refused.message}; {outcome.refused.hint}"
    if outcome.problem_count and not outcome.rows:
        first = outcome.problems[0]
        more = f" ({outcome.problem_count} such rows)" if outcome.problem_count > 1 else ""
        return f"{first.place}: {first.field} {first.reason}{more}".replace(":  ", ": ")
    report = outcome.report
    assert report is not None
    dropped = [f"{count} dropped: {name}" for name, count in report.dropped.items()]
    findings = [f"{finding.kind} in {finding.rows}" for finding in (*report.secrets, *report.personal_data)]
    warnings = [warning for warning in report.warnings if not warning.startswith("there are only")][:1]  # these files are small on purpose
    return "; ".join([f"{len(rows)} row{'s' if len(rows) != 1 else ''}", *dropped, *findings, *warnings])


def judge(case: Case, outcome: IngestOutcome, kept: list[Answer], answer: Answer) -> tuple[str, str]:
    """The kind of another loader's answer, and the answer in a line."""
    if "error" in answer:
        text = answer["error"].rpartition(" ← ")[2].strip().split("\n")[0]
        return "error", f"error: {text}"
    count, dropped = answer["count"], answer.get("dropped", 0)
    loaded = f"{count} row{'s' if count != 1 else ''}"
    if dropped:
        return "dropped", f"{loaded}; {dropped} dropped with a line in the log"
    if outcome.rows is None or _is_faulty(case):
        return "silent", f"{loaded}; not noticed"
    if count != len(kept) + outcome.rows.duplicates_dropped:
        return "changed", f"{loaded} instead of {len(kept)}"
    theirs = "\0".join(text for row in answer["rows"] for text in _texts(row))
    lost = [text for row in kept for text in _texts(row) if not all(piece in theirs for piece in text.split("\n\n"))]
    if lost:
        shown = ", ".join(f"`{text if len(text) <= MAX_SHOWN_CHARS else text[:MAX_SHOWN_CHARS] + '…'}`" for text in lost[-1:])
        return "changed", f"{loaded}, changed: {shown} is lost"
    return "same", loaded


def _texts(value: object) -> Iterator[str]:
    """The texts in a row, at any depth."""
    match value:
        case str() if value not in ROLES:
            yield value
        case dict():
            for inner in value.values():
                yield from _texts(inner)
        case list():
            for inner in value:
                yield from _texts(inner)
        case _:
            return


def _cell(text: str) -> str:
    shown = " ".join(text.split())
    shown = shown if len(shown) <= MAX_CELL_CHARS else shown[:MAX_CELL_CHARS].rstrip() + "…"
    return shown.replace("|", "\\|").replace("<", "&lt;").encode("utf-8", "replace").decode()


if __name__ == "__main__":
    sys.exit(main())
