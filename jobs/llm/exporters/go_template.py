"""A chat template in Ollama's template language, derived from the Jinja template that a model was trained with.

Ollama runs Go templates and no Jinja. The Jinja template is rendered with marker texts as messages, and what it writes around them becomes
a Go template, which writes a piece of text before each message depending on the message's role and the role before it. Templates that do
more than this, such as writing a date, have no such form; `derive_turn_pieces` compares the two on several conversations to find out.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from jobs.llm.chat_templates import TEMPLATE_ERRORS

Role = Literal["system", "user", "assistant"]
Turn = tuple[Role, str]
# Renders a conversation with the Jinja template, without a BOS token, up to the start of the answer where it ends with a question.
RenderTurns = Callable[[Sequence[Turn]], str]

FIRST: Literal["first"] = "first"
Position = tuple[Role | Literal["first"], Role]  # the role before a message, and its own

# A template that calls these writes another text tomorrow.
CLOCK_FUNCTIONS = ("strftime_now", "datetime", "now(")


@dataclass(frozen=True)
class TurnPieces:
    """What is written around messages: the text before each one by its position, and the text that starts an answer."""

    before: Mapping[Position, str]
    answer_start: str
    trims: bool  # the Jinja template removes spaces around messages, which Ollama's template language cannot

    @property
    def has_system(self) -> bool:
        """Whether the model may be given a system message."""
        return (FIRST, "system") in self.before


class NoGoTemplate(Exception):
    """The Jinja template has no equivalent; the message says why."""


def derive_turn_pieces(template: str, render: RenderTurns) -> TurnPieces:
    """The pieces with which a Go template writes what this template does. Raises NoGoTemplate."""
    if any(name in template for name in CLOCK_FUNCTIONS):
        raise NoGoTemplate("the chat template writes the date")
    try:
        question = _split(render, ["user"])
        dialog = _split(render, ["user", "assistant", "user"])
        before: dict[Position, str] = {
            (FIRST, "user"): question[0],
            ("user", "assistant"): dialog[1],
            ("assistant", "user"): dialog[2],
        }
    except TEMPLATE_ERRORS as error:
        raise NoGoTemplate(f"the chat template rejects a question: {error}") from error
    try:
        with_system = _split(render, ["system", "user"])
        before |= {(FIRST, "system"): with_system[0], ("system", "user"): with_system[1]}
    except (*TEMPLATE_ERRORS, NoGoTemplate):  # such as: System role not supported
        pass
    pieces = TurnPieces(before, question[-1], trims=_trims(render))
    _check(pieces, render)
    return pieces


def render_go_template(pieces: TurnPieces, turns: Sequence[Turn]) -> str:
    """What `write_go_template`'s template renders for a conversation: the same steps in the same order."""
    text, previous = "", FIRST
    for role, content in turns:
        if role == "system" and not pieces.has_system:
            continue
        text += _piece_before(pieces, previous, role) + content
        previous = role
    return text if previous == "assistant" else text + pieces.answer_start


def write_go_template(pieces: TurnPieces) -> str:
    """The pieces as a Go template."""
    system = f'{{{{- if eq .Role "system" }}}}{_print(pieces, FIRST, "system")}{{{{ .Content }}}}' if pieces.has_system else ""
    after_system = f'{{{{ if eq $previous "system" }}}}{_print(pieces, "system", "user")}{{{{ else }}}}' if pieces.has_system else ""
    end = "{{ end }}" if pieces.has_system else ""
    lines = [
        '{{- $previous := "" }}',
        "{{- range .Messages }}",
        *([system] if system else []),
        f'{{{{- {"else if" if system else "if"} eq .Role "user" }}}}'
        f'{{{{ if eq $previous "assistant" }}}}{_print(pieces, "assistant", "user")}{{{{ else }}}}'
        f"{after_system}{_print(pieces, FIRST, 'user')}{end}{{{{ end }}}}{{{{ .Content }}}}",
        f'{{{{- else if eq .Role "assistant" }}}}{_print(pieces, "user", "assistant")}{{{{ .Content }}}}',
        "{{- end }}",
        *([] if system else ['{{- if ne .Role "system" }}']),
        "{{- $previous = .Role }}",
        *([] if system else ["{{- end }}"]),
        "{{- end }}",
        f'{{{{- if ne $previous "assistant" }}}}{{{{ {_quote(pieces.answer_start)} }}}}{{{{ end }}}}',
    ]
    return "\n".join(lines)


def _piece_before(pieces: TurnPieces, previous: str, role: Role) -> str:
    """Only the positions that the Go template tells apart; it treats every other one as the nearest of them."""
    match role:
        case "system":
            return pieces.before[FIRST, "system"]
        case "assistant":
            return pieces.before["user", "assistant"]
        case "user" if previous == "assistant":
            return pieces.before["assistant", "user"]
        case "user" if previous == "system":
            return pieces.before["system", "user"]
        case "user":
            return pieces.before[FIRST, "user"]


def _split(render: RenderTurns, roles: Sequence[Role]) -> list[str]:
    """The texts around the messages of a conversation with marker texts. Raises NoGoTemplate for one that a template repeats or omits."""
    markers = [f"Mark{n}{role.title()}Text" for n, role in enumerate(roles)]
    text = render(list(zip(roles, markers, strict=True)))
    parts = re.split("|".join(markers), text)
    if re.findall("|".join(markers), text) != markers:
        raise NoGoTemplate("the chat template does not write every message once, in order")
    return parts


def _trims(render: RenderTurns) -> bool:
    return "  MarkText  " not in render([("user", "  MarkText  ")])


def _check(pieces: TurnPieces, render: RenderTurns) -> None:
    """Compare the two templates on conversations of several turns, texts and lengths. Raises NoGoTemplate."""
    dialog: list[Turn] = [
        ("user", "Hello.\n\n  Who are you?"),
        ("assistant", 'I am "a model" \\ {{ .Content }}'),
        ("user", "模型 <b>&amp;</b>"),
    ]
    longer: list[Turn] = [*dialog, ("assistant", "one\ntwo"), ("user", "Bye.")]
    conversations = [dialog, longer]
    if pieces.has_system:
        conversations += [[("system", "Be brief.\nAnd kind."), *turns] for turns in (dialog[:1], dialog, longer)]
    for turns in conversations:
        if render(turns) != render_go_template(pieces, turns):
            raise NoGoTemplate("the chat template writes the same message differently in different places")


def _print(pieces: TurnPieces, previous: Role | Literal["first"], role: Role) -> str:
    text = pieces.before[previous, role]
    return f"{{{{ {_quote(text)} }}}}" if text else ""


def _quote(text: str) -> str:
    """A Go string: JSON's escapes are valid in Go, and none of them yields the three quotes that end a Modelfile's text."""
    return json.dumps(text, ensure_ascii=False)
