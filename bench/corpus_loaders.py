"""What another loader makes of the files of a folder: `python -m bench.corpus_loaders (datasets|llama_factory) FOLDER OUTPUT`.

It runs in an environment that has that loader, and writes an object: for each file the rows as loaded, or the error. Each file is loaded in
a process of its own with limits of memory and time, because some are made to exhaust them.
"""

import contextlib
import io
import json
import logging
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

TIME_LIMIT_S = 60
MEMORY_BYTES = 16 << 30  # that a process may address; torch alone maps several gigabytes
SHOWN_ROWS = 70

Rows = list[dict[str, Any]]


def main(loader: str, folder: str, output: str) -> None:
    """Load every file, and write down what came of it."""
    load = {"datasets": prepare_datasets, "llama_factory": prepare_llama_factory}[loader]()
    answers = {path.name: load_apart(load, path) for path in sorted(Path(folder).iterdir())}
    Path(output).write_text(json.dumps(answers))


def prepare_datasets() -> Callable[[Path], dict[str, Any]]:
    """`load_dataset` on a folder that has the file alone, so that it chooses how to read it."""
    import datasets

    datasets.disable_progress_bars()

    def load(path: Path) -> dict[str, Any]:
        rows = datasets.load_dataset(str(path.parent), split="train", cache_dir=str(path.parent.parent / "cache"))
        return {"version": datasets.__version__, "count": len(rows), "rows": rows.select(range(min(SHOWN_ROWS, len(rows)))).to_list()}

    return load


def prepare_llama_factory() -> Callable[[Path], dict[str, Any]]:
    """The loader and the converter of LLaMA-Factory, with the columns that a person who knows the file would name."""
    import datasets
    from llamafactory.data.loader import _load_single_dataset
    from llamafactory.data.parser import DatasetAttr
    from llamafactory.extras.constants import FILEEXT2TYPE
    from llamafactory.hparams import DataArguments, ModelArguments

    datasets.disable_progress_bars()

    def load(path: Path) -> dict[str, Any]:
        kind = FILEEXT2TYPE.get(path.suffix[1:])
        attributes = DatasetAttr("file", dataset_name=path.name)
        cache = str(path.parent.parent / "cache")
        if kind is not None:
            columns = datasets.load_dataset(kind, data_files=[str(path)], split="train", cache_dir=cache).column_names
            attributes.join(describe_columns(columns))
        model = ModelArguments(model_name_or_path="none", cache_dir=cache)
        rows = _load_single_dataset(attributes, model, DataArguments(dataset_dir=str(path.parent)), SimpleNamespace(local_process_index=0))
        answers = 2 if attributes.ranking or attributes.kto_tag else 1
        is_text = attributes.prompt == "text"
        # The rule of its processors, which drop the other rows with a line in the log.
        kept = [row for row in rows if len(row["_prompt"]) % 2 == 1 and (is_text or len(row["_response"]) == answers)]
        return {"count": len(kept), "dropped": len(rows) - len(kept), "rows": kept[:SHOWN_ROWS]}

    return load


def describe_columns(columns: list[str]) -> dict[str, Any]:
    """The entry of dataset_info.json for a file with these columns."""
    if "messages" in columns or "conversations" in columns:
        name = "messages" if "messages" in columns else "conversations"
        tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant", "system_tag": "system"}
        return {
            "formatting": "sharegpt",
            "columns": {"messages": name, **({"tools": "tools"} if "tools" in columns else {})},
            **({"tags": tags} if name == "messages" else {}),
        }
    by_lower = {column.lower(): column for column in columns}
    chosen = {
        "prompt": ("prompt", "question", "instruction", "kundenfrage", "text"),
        "response": ("completion", "answer", "output", "completions", "unsere_reaktion"),
        "query": ("input",),
        "history": ("history",),
        "chosen": ("chosen",),
        "rejected": ("rejected",),
        "kto_tag": ("label",),
    }
    found = {field: by_lower[name] for field, names in chosen.items() for name in reversed(names) if name in by_lower}
    return {"ranking": "chosen" in found, "columns": found}


def load_apart(load: Callable[[Path], dict[str, Any]], path: Path) -> dict[str, Any]:
    """Load a file in a process of its own; its answer, or the error."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "answer.json")
        if (child := os.fork()) == 0:
            _load_in_child(load, path, Path(folder), answer)
        _, status = os.waitpid(child, 0)
        if answer.exists():
            return json.loads(answer.read_text())
        return {
            "error": f"took more than {TIME_LIMIT_S} s" if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM else "crashed"
        }


def _load_in_child(load: Callable[[Path], dict[str, Any]], path: Path, folder: Path, answer: Path) -> None:
    signal.alarm(TIME_LIMIT_S)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    alone = folder / "data" / path.name
    alone.parent.mkdir()
    os.link(path, alone) if path.stat().st_dev == folder.stat().st_dev else alone.write_bytes(path.read_bytes())
    log = io.StringIO()
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            outcome = load(alone)
    except BaseException as error:  # noqa: BLE001  # whatever a loader raises is its answer
        causes = [error, *([error.__cause__] if error.__cause__ else [])]
        outcome = {"error": " ← ".join(f"{type(each).__name__}: {str(each).strip()}" for each in causes).replace(str(folder), "")}
    answer.write_text(json.dumps(outcome, default=str))
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
