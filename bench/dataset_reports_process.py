"""`python -m bench.dataset_reports_process REQUEST`: measure the parts of a report in the environment `data`; prints the costs as JSON."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import orjson

from bench.dataset_reports import Costs, Request
from jobs.ingest.reports.languages import LanguageCounter
from jobs.ingest.reports.near_duplicates import NearDuplicateFinder
from jobs.ingest.reports.personal_data import find_personal_data
from jobs.ingest.reports.row_texts import RowTexts, read_texts
from jobs.ingest.reports.secrets import find_secrets, may_have_secrets
from jobs.ingest.reports.token_lengths import BATCH_ROWS, TokenCounter
from jobs.ingest.reports.warnings import RowStatistics

BASE_ID = "bench/base"


def main(request: Request) -> Costs:
    """Measure each part over all rows."""
    path = Path(request.rows)
    lines = path.read_bytes().splitlines()
    rows = [orjson.loads(line) for line in lines]
    texts = [read_texts(row) for row in rows]
    parts = {
        "texts": _time(lambda: [read_texts(row) for row in rows]),
        "triggers of secrets": _time(lambda: [may_have_secrets(line) for line in lines]),
        "secrets": _time(lambda: [find_secrets(each.everything) for each in texts]),
        "personal data": _time(lambda: [find_personal_data(each.everything) for each in texts]),
        "languages": _time(lambda: _count_languages(texts)),
        "near-duplicates": _time(lambda: _find_near_duplicates(texts)),
        "statistics": _time(lambda: _add_statistics(texts)),
    }
    if request.tokenizer_folder is None:
        return Costs(parts=parts)
    counter = TokenCounter({"train": path}, BASE_ID, Path(request.tokenizer_folder))
    started_at = time.perf_counter()
    tokens = sum(row.length for n in range(0, len(rows), BATCH_ROWS) for row in counter.count(rows[n : n + BATCH_ROWS]))
    return Costs(parts=parts, token_rows_per_s=len(rows) / (time.perf_counter() - started_at), tokens_per_row=tokens / len(rows))


def _time(run: Callable[[], object]) -> float:
    started_at = time.perf_counter()
    run()
    return time.perf_counter() - started_at


def _count_languages(texts: list[RowTexts]) -> dict[str, float]:
    counter = LanguageCounter()
    for each in texts:
        counter.add(each.conversation)
    return counter.shares()


def _find_near_duplicates(texts: list[RowTexts]) -> object:
    finder = NearDuplicateFinder()
    held_out = len(texts) // 10
    for number, each in enumerate(texts[:held_out], 1):
        finder.add_held_out(number, each.conversation)
    for number, each in enumerate(texts[held_out:], 1):
        finder.add_training(number, each.conversation)
    return finder.finish()


def _add_statistics(texts: list[RowTexts]) -> RowStatistics:
    statistics = RowStatistics()
    for each in texts:
        statistics.add(each)
    return statistics


if __name__ == "__main__":
    print(main(Request.load(sys.argv[1].encode())).model_dump_json())
