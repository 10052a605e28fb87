"""Advice of the API as commands and options: whatever the code advises can be done on the command line."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.hints import COMMANDS, OPTIONS, translate_hint
from cli.main import COMMANDS as COMMAND_TABLE

SOURCE = Path(__file__).parents[3]
ROUTE = re.compile(r"(?:GET|POST|PUT|PATCH|DELETE) /")
DESCRIBING = {"description", "summary"}  # keyword arguments with text for the API's documentation
ALL_OPTIONS = frozenset(OPTIONS.values())
# Named by settings and problems of a deployment, which its operator solves over HTTP.
FOR_OPERATORS = "/internal/"


def find_routes_in_texts(tree: ast.Module) -> Iterator[str]:
    """Every text in code that names a route, with `X` for what is filled in. Documentation is left out."""
    documentation = {
        id(inner)
        for node in ast.walk(tree)
        for described in (
            [node.value] if isinstance(node, ast.Expr) else [node.value] if isinstance(node, ast.keyword) and node.arg in DESCRIBING else []
        )
        for inner in ast.walk(described)
    }
    inside_templates = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if id(node) in documentation or id(node) in inside_templates:
            continue
        if isinstance(node, ast.JoinedStr):
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
        else:
            continue
        if ROUTE.search(text) and FOR_OPERATORS not in text:
            yield text


def find_advice() -> list[str]:
    paths = [path for package in ("service", "schema", "jobs", "storage") for path in (SOURCE / package).rglob("*.py")]
    return sorted({text for path in paths for text in find_routes_in_texts(ast.parse(path.read_text()))})


def test_code_contains_advice() -> None:
    assert len(find_advice()) > 20


@pytest.mark.parametrize("text", find_advice())
def test_advice_becomes_a_command(text: str) -> None:
    translated = translate_hint(text)
    assert not ROUTE.search(translated)
    for name in re.findall(r"`tunesmith (\w+)", translated):
        assert name in COMMAND_TABLE


@pytest.mark.parametrize("command", COMMANDS.values())
def test_commands_of_the_table_exist(command: str) -> None:
    assert command == "docs/api.md" or command.split()[1].strip("`") in COMMAND_TABLE


@pytest.mark.parametrize(
    ("hint", "translated"),
    [
        ("POST /jobs/{id}/export publishes it", "`tunesmith export ID` publishes it"),
        ("POST /jobs/training_1/retry continues it", "`tunesmith retry training_1` continues it"),
        ("see `GET /jobs/{id}/logs`; try again", "see `tunesmith logs ID`; try again"),
        ("delete some: DELETE /datasets/{id}, DELETE /jobs/{id}", "delete some: `tunesmith datasets delete ID`, `tunesmith delete ID`"),
        ("export it (POST /jobs/a/export), and wait", "export it (`tunesmith export a`), and wait"),
        ("GET /capabilities lists them", "`tunesmith capabilities` lists them"),
        ("GET /jobs.", "`tunesmith jobs`."),
        ("try a smaller batch_size or max_seq_length", "try a smaller --batch-size or --max-length"),
        ("set training_config.hyperparameters.learning_rate", "set --lr"),
        ("the method or the format", "the method or the format"),
        ('POST /datasets/{id}/token_lengths with {"base_model_id": "a/b"}', "`tunesmith datasets tokens ID --base a/b`"),
        ('correct it, or send on_invalid "drop" to keep the others', "correct it, or --drop-invalid to keep the others"),
        (
            'choose one with a mapping: {"text": "{a}"} or {"text": "b"}',
            """choose one with --mapping '{"text": "{a}"}' or --mapping '{"text": "b"}'""",
        ),
        ("""--mapping '{"text": "b"}'""", """--mapping '{"text": "b"}'"""),
        ("set weight_decay or 'batch_size'", "set weight_decay or 'batch_size'"),
    ],
)
def test_hint_is_translated(hint: str, translated: str) -> None:
    assert translate_hint(hint, ALL_OPTIONS) == translated


def test_fields_stay_where_the_command_has_no_option() -> None:
    assert translate_hint("try a smaller batch_size", frozenset({"--json"})) == "try a smaller batch_size"
