"""A prompt that a chat template wrote is read back as its turns, for every template that can be written for Ollama."""

import pytest

from jobs.llm.evaluation.readable_prompts import read_turns
from jobs.llm.exporters.go_template import Turn, render_go_template
from tests.exports.test_usage import CONVERSATIONS, TEMPLATE_NAMES, VISION_TEMPLATES, WITHOUT_GO_TEMPLATE, make_template, read_template


@pytest.mark.parametrize("name", [name for name in TEMPLATE_NAMES if name not in WITHOUT_GO_TEMPLATE | VISION_TEMPLATES])
def test_turns_are_read_back(name: str) -> None:
    pieces = make_template(read_template(name)).pieces
    assert pieces is not None
    for turns in CONVERSATIONS:
        expected: list[Turn] = [turn for turn in turns if turn[0] != "system" or pieces.has_system]
        text = render_go_template(pieces, turns)
        read = read_turns(pieces, text)
        assert read is not None
        if expected[0][0] == "system" and read[0][0] == "user":  # the template has one turn for both
            joined = f"{expected[0][1]}{pieces.before['system', 'user']}{expected[1][1]}"
            expected = [("user", joined), *expected[2:]]
        assert read == expected
        assert read_turns(pieces, f"{text} and more") is None
