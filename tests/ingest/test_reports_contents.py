"""Languages, near-duplicates and warnings: planted cases are found exactly, and clean rows get no remark."""

import json
from typing import Any

import pytest

from schema.dataset import EVAL_SPLIT
from tests.ingest.report_harness import ingest_rows, list_clean_pairs, make_clean_rows, report_on, report_on_answers

GERMAN = "Der Server lehnt die Anfrage ab, weil das Kennwort schon vor mehreren Wochen abgelaufen ist."
FRENCH = "La commande a été envoyée hier soir, mais le client n'a pas encore reçu de confirmation."
LONG_TEXT = "The committee met on the third day and wrote down what each member had said about the old bridge over the river. " * 3


def make_rows(count: int, prompt: str, completion: str) -> list[dict[str, Any]]:
    """Rows in which {} is the number of the row."""
    return [{"prompt": prompt.replace("{}", str(n)), "completion": completion.replace("{}", str(n))} for n in range(count)]


def vary(row: dict[str, Any], answer: str) -> dict[str, Any]:
    return {**row, "completion": answer}


# --- clean rows ----------------------------------------------------------------------------------------------------------


def test_clean_rows_get_no_remark() -> None:
    rows, report = ingest_rows(make_clean_rows())
    assert report.warnings == ()
    assert (report.personal_data, report.secrets) == ((), ())
    assert report.near_duplicates is not None
    assert report.near_duplicates.compared_rows == rows.splits[EVAL_SPLIT].rows
    assert report.near_duplicates.held_out_rows_with_a_near_duplicate == 0
    assert report.languages["en"] > 0.97


def test_the_same_rows_give_the_same_report() -> None:
    assert ingest_rows(make_clean_rows()) == ingest_rows(make_clean_rows())


def test_classes_with_equal_answers_get_no_remark() -> None:
    rows = [{"prompt": question, "completion": ("how", "what", "other")[n % 3]} for n, (question, _) in enumerate(list_clean_pairs())]
    assert report_on(rows).warnings == ()


def test_same_system_message_in_all_rows_gets_no_remark() -> None:
    system = {"role": "system", "content": "You answer questions about Python. " * 20}
    rows = [
        {"messages": [system, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in list_clean_pairs()
    ]
    report = report_on(rows[40:], rows[:40])
    assert report.warnings == ()
    assert report.characters == sum(len(message["content"]) for row in rows for message in row["messages"])


# --- languages -----------------------------------------------------------------------------------------------------------


def test_shares_of_languages_are_counted() -> None:
    rows = make_rows(50, "", GERMAN) + make_rows(30, "", FRENCH) + make_rows(20, "x", "{}")
    assert report_on(rows).languages == {"de": 0.5, "fr": 0.3, "und": 0.2}


def test_code_has_no_language() -> None:
    code = "for (int i = 0; i < n; ++i) { sum[i] += a[i] * b[i]; } return {sum, n};"
    assert report_on(make_rows(60, "", code)).languages == {"und": 1.0}


def test_several_languages_are_pointed_out() -> None:
    rows = make_clean_rows(300) + [{"prompt": f"Frage {n}", "completion": f"{GERMAN} {n}"} for n in range(100)]
    (warning,) = [warning for warning in report_on(rows).warnings if "languages" in warning]
    assert "several languages (en 74%, de 25%)" in warning


# --- near-duplicates -----------------------------------------------------------------------------------------------------


def test_rows_that_share_a_long_instruction_are_no_near_duplicates() -> None:
    rows = [{"prompt": f"{LONG_TEXT * 3} {question}", "completion": answer} for question, answer in list_clean_pairs()]
    found = report_on(rows[60:], rows[:60]).near_duplicates
    assert found is not None
    assert found.compared_rows == 60
    assert found.held_out_rows_with_a_near_duplicate == 0


def test_rows_that_differ_in_case_and_one_word_are_near_duplicates() -> None:
    held_out = make_clean_rows(60)
    for row, (_, more) in zip(held_out, list_clean_pairs()[100:], strict=False):
        row["completion"] += f" {more} {more[::-1]}" * 3
    train = make_clean_rows()[150:]
    train[10] = vary(held_out[4], held_out[4]["completion"].upper() + "!!")
    train[20] = vary(held_out[30], held_out[30]["completion"] + " Certainly.")
    report = report_on(train, held_out)
    assert report.near_duplicates is not None
    assert report.near_duplicates.held_out_rows_with_a_near_duplicate == 2
    assert report.near_duplicates.examples == ((5, 11), (31, 21))
    assert any(warning.startswith("2 held-out rows (3%) have a near-duplicate among the training rows") for warning in report.warnings)


def test_every_held_out_row_is_found_again_among_many() -> None:
    held_out, train = make_clean_rows()[:200], make_clean_rows()
    found = report_on(train, held_out).near_duplicates
    assert found is not None
    assert found.held_out_rows_with_a_near_duplicate == 200
    assert found.examples[:3] == ((1, 1), (2, 2), (3, 3))


def test_short_rows_are_near_duplicates_only_when_their_words_are_equal() -> None:
    train, held_out = make_rows(60, "{} + 1?", "sum {}"), make_rows(30, "{}0 + 2?", "sum {}")
    held_out[7] = {"prompt": "5 + 1", "completion": "Sum: 5"}
    found = report_on(train, held_out).near_duplicates
    assert found is not None
    assert found.examples == ((8, 6),)


# --- warnings ------------------------------------------------------------------------------------------------------------


def find_warning(report_rows: list[dict[str, Any]], words: str) -> str:
    warnings = report_on(report_rows).warnings
    assert len(warnings) == 1, warnings
    assert words in warnings[0]
    return warnings[0]


def test_few_rows_are_pointed_out() -> None:
    find_warning(make_clean_rows(12), "there are only 12 rows; most tasks need at least 50")


def test_few_held_out_rows_are_pointed_out() -> None:
    (warning,) = report_on(make_clean_rows()[8:], make_clean_rows(8)).warnings
    assert warning.startswith("only 8 rows are held out, so the evaluation varies by chance")


def test_equal_answers_are_pointed_out() -> None:
    rows = [vary(row, "It depends on what you need.") for row in make_clean_rows()]
    find_warning(rows, "all answers are the same")


def test_nearly_equal_answers_are_pointed_out() -> None:
    rows = [vary(row, "no" if n % 50 == 0 else "yes") for n, row in enumerate(make_clean_rows())]
    find_warning(rows, "98% of the answers are the same")


def test_one_frequent_answer_is_pointed_out() -> None:
    rows = make_clean_rows()
    for row in rows[:120]:
        row["completion"] = "I am sorry, but I cannot help with that question."
    find_warning(rows, "30% of the rows have one and the same answer")


def test_leaked_answers_are_pointed_out() -> None:
    rows = make_clean_rows()
    for row in rows[:160]:
        row["prompt"] += f" Expected: {row['completion']}"
    find_warning(rows, "in 40% of the rows the prompt already contains the answer")


def test_leaked_classes_are_pointed_out() -> None:
    rows = [
        {"prompt": f"{question}\nlabel: {name}", "completion": name}
        for n, (question, _) in enumerate(list_clean_pairs())
        for name in [("urgent", "normal")[n % 2]]
    ]
    find_warning(rows, "in 100% of the rows the prompt already contains the answer")


def test_classes_that_every_prompt_lists_are_no_leak() -> None:
    rows = [
        {"prompt": f"{question}\nAnswer with urgent or normal.", "completion": ("urgent", "normal")[n % 2]}
        for n, (question, _) in enumerate(list_clean_pairs())
    ]
    assert report_on(rows).warnings == ()


def test_prompts_without_words_are_pointed_out() -> None:
    rows = make_clean_rows()
    for row, prompt in zip(rows, ("?", "...", " - "), strict=False):
        row["prompt"] = prompt
    find_warning(rows, "3 rows (1%) have a prompt without a single word")


@pytest.mark.parametrize("noise", ["<p>Hello</p>", "&nbsp;and", '<div class="x">'])
def test_markup_is_pointed_out(noise: str) -> None:
    rows = make_clean_rows()
    for row in rows[:40]:
        row["completion"] += noise
    find_warning(rows, "40 rows (10%) have HTML tags or entities in the text")


def test_wrong_encodings_are_pointed_out() -> None:
    rows = make_clean_rows()
    for row in rows[:4]:
        row["completion"] += " Café au lait déjà".encode().decode("cp1252")
    find_warning(rows, "4 rows (1%) have characters of a wrong encoding, such as Ã© for é")


def test_long_tail_is_pointed_out() -> None:
    rows = make_clean_rows()
    for n, row in enumerate(rows[:8]):
        row["prompt"] = " ".join(f"{n} {question}" for question, _ in list_clean_pairs()[n * 40 :][:200])
    find_warning(rows, "a few rows are many times as long as most")


def test_texts_of_every_type_are_counted() -> None:
    rows: list[dict[str, Any]] = [
        {"text": "abc"},
        {"prompt": "abc", "chosen": "de", "rejected": "f"},
        {
            "prompt": [{"role": "user", "content": "abc"}],
            "chosen": [{"role": "assistant", "content": "d"}],
            "rejected": [{"role": "assistant", "content": "e"}],
        },
        {"prompt": "abc", "answer": "not read by the model"},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "ab"}, {"type": "image", "image": "data:"}]},
                {"role": "assistant", "content": "c"},
            ]
        },
    ]
    assert [report_on([row]).characters for row in rows] == [3, 6, 5, 3, 3]


def test_arguments_of_calls_are_read() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "send", "arguments": {"to": ["maria.kowalska@web.de"]}}}
    row = {"messages": [{"role": "user", "content": "Send it"}, {"role": "assistant", "content": "", "tool_calls": [call]}]}
    (finding,) = report_on([json.loads(json.dumps(row))]).personal_data
    assert finding.kind == "email"


def test_empty_answers_need_no_special_care() -> None:
    assert report_on_answers("x").sampled_rows == len(make_clean_rows())
