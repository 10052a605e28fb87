"""Templates: names of columns in braces, and nothing else."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.ingest.mapping.templates import parse_template
from jobs.ingest.records import InvalidInput
from jobs.ingest.rows.values import InvalidValue, JsonObject, Number

QUICK_SETTINGS = settings(max_examples=100, deadline=None, database=None)
COLUMNS = ("a", "b", "c", "my question", "a.b", "{odd}", "frage")


def render(source: str, **record: object) -> str:
    values: JsonObject = dict(record)
    return parse_template(source, "prompt", COLUMNS).render(values, "prompt")


@pytest.mark.parametrize(
    ("source", "record", "text"),
    [
        ("a", {"a": " x\n"}, " x\n"),
        ("{a}", {"a": "\n\n x "}, "\n\n x "),
        ("{a}{b}", {"a": "1", "b": "2"}, "12"),
        ("Q: {a}\nA:", {"a": "why"}, "Q: why\nA:"),
        ("{{{a}}}", {"a": "x"}, "{x}"),
        ('{{"q": "{a}"}}', {"a": "x"}, '{"q": "x"}'),
        ("{a}!", {"a": Number("1.50")}, "1.50!"),
        ("{a}!", {"a": True}, "true!"),
        ("{a}!", {"a": None}, "!"),
        ("{a}!", {}, "!"),
        ("{a}: {b}", {"a": "", "b": ""}, ": "),
        ("{a}\n\n{b}", {"a": "x", "b": ""}, "x"),
        ("{a}\n\n{b}", {"a": "x"}, "x"),
        ("{a}\n\n{b}", {"a": "x", "b": " \n"}, "x"),
        ("{a}\n\n{b}", {"a": "", "b": "y"}, "y"),
        ("{a}\n\n{b}\n\n{c}", {"a": "x", "c": "z"}, "x\n\nz"),
        ("{a}\n\n{b}\n\n{c}", {"a": "x"}, "x"),
        ("{a}\n\n{b}\n\n{c}", {"c": "z"}, "z"),
        ("{a}\n\n{b}\n\n{c}", {"a": "x\n", "b": "\ny"}, "x\n\n\n\ny"),
        ("Read:\n{a}\n\nSay:", {"a": ""}, "Read:\n\nSay:"),
        ("{a.b}", {"a.b": "x"}, "x"),
        ("{odd}", {"{odd}": "x"}, "x"),
    ],
)
def test_template_is_rendered(source: str, record: dict[str, object], text: str) -> None:
    assert parse_template(source, "prompt", COLUMNS).render(record, "prompt") == text


def test_column_with_a_space_is_read() -> None:
    template = parse_template("<{my question}>", "prompt", COLUMNS)
    assert (template.render({"my question": "x"}, "prompt"), template.columns) == ("<x>", ("my question",))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("answer", ["prompt names the column 'answer'", "the file has the columns a, b, c"]),
        ("Frage", ["did you mean 'frage'?"]),
        ("{My Question}", ["did you mean 'my question'?"]),
        ("{ a }", ["names the column ' a '", "did you mean 'a'?"]),
        ("{a.__class__}", ["names the column 'a.__class__'"]),
        ("{a[0]}", ["names the column 'a[0]'"]),
        ("{a!r}", ["names the column 'a!r'"]),
        ("{a:>10}", ["names the column 'a:>10'"]),
        ("{0}", ["names the column '0'"]),
        ("{}", ["single '{' at character 1", "{{ and }}"]),
        ("{a", ["single '{' at character 1"]),
        ("x}", ["single '}' at character 2"]),
        ("two words", ["names the column 'two words'"]),
    ],
)
def test_template_that_names_no_column_is_refused(source: str, words: list[str]) -> None:
    with pytest.raises(InvalidInput) as excinfo:
        parse_template(source, "prompt", COLUMNS)
    assert excinfo.value.problem.param == "mapping.prompt"
    for word in words:
        assert word in f"{excinfo.value.problem.message}; {excinfo.value.problem.hint}"


def test_list_in_a_template_is_an_error_that_names_the_column() -> None:
    with pytest.raises(InvalidValue) as excinfo:
        render("{a}{b}", a="x", b=[])
    assert (excinfo.value.field, excinfo.value.code) == ("prompt", "wrong_type")
    assert "column 'b' is a list" in excinfo.value.reason


names = st.text(st.characters(exclude_characters="{}", exclude_categories=("Cs",)), min_size=1, max_size=12)
values = st.text(max_size=12)


@QUICK_SETTINGS
@given(record=st.dictionaries(names, values, min_size=1, max_size=5), data=st.data())
def test_columns_and_literals_are_joined_as_they_are(record: dict[str, str], data: st.DataObject) -> None:
    literals = st.text(st.characters(exclude_characters="\n", exclude_categories=("Cs",)), min_size=1, max_size=6)
    source, expected = "<", "<"
    for name in data.draw(st.lists(st.sampled_from(sorted(record)), min_size=1, max_size=5)):
        literal = data.draw(literals) + "|"
        source += "{" + name + "}" + literal.replace("{", "{{").replace("}", "}}")
        expected += record[name] + literal
    assert parse_template(source, "text", tuple(record)).render(dict(record), "text") == expected


@QUICK_SETTINGS
@given(name=st.text(min_size=1, max_size=12), value=st.text(max_size=40))
def test_the_name_of_a_column_keeps_its_value(name: str, value: str) -> None:
    template = parse_template(name, "text", (name,))
    assert template.only_column == name
    assert template.render({name: value}, "text") == value


@QUICK_SETTINGS
@given(source=st.text("{}ab x\n.[]!:0", max_size=20), record=st.fixed_dictionaries({"a": values, "b": values}))
def test_any_text_is_a_template_or_an_error(source: str, record: dict[str, str]) -> None:
    try:
        template = parse_template(source, "system", ("a", "b"))
    except InvalidInput as error:
        assert error.problem.hint
        return
    assert isinstance(template.render(dict(record), "system"), str)
