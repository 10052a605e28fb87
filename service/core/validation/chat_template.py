"""Whether a caller's chat template is Jinja as transformers reads it. It is not rendered: a template is a program, and its job limits it.

Parsing the longest template that a request may have takes less than a second.
"""

from typing import TYPE_CHECKING

from service.core.errors import InvalidRequest

if TYPE_CHECKING:
    from jinja2 import Environment

PARAM = "training_config.chat_template"
MAX_MESSAGE_CHARS = 200


def check_chat_template(template: str) -> None:
    """Raise InvalidRequest unless the template can be parsed."""
    from jinja2 import TemplateSyntaxError  # few requests have a template

    try:
        _make_environment().parse(template)
    except TemplateSyntaxError as error:
        reason = ascii(error.message or "syntax error")[1 : MAX_MESSAGE_CHARS + 1].removesuffix("'").removesuffix('"')
        raise _make_error(f"line {error.lineno}: {reason}") from error
    except RecursionError as error:
        raise _make_error("it is nested too deeply") from error
    except ValueError as error:  # an integer of thousands of digits
        raise _make_error("it has a number that is too long") from error


def _make_environment() -> "Environment":
    """Jinja with the tags that transformers adds: loop controls, and `generation` around what the assistant says."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012  # as jinja declares it

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])


def _make_error(reason: str) -> InvalidRequest:
    hint = "send a Jinja template as Hugging Face tokenizers have it, or leave chat_template out to use the base model's"
    return InvalidRequest(f"chat_template cannot be parsed: {reason}", hint=hint, param=PARAM)
