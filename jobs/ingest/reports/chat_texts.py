"""Turns conversations into the texts that a training makes of them, to count their tokens.

A base's own chat template is rendered as transformers does, in its sandbox. For a base without one, training chooses a neutral template by
the tokens that the tokenizer has; the forms of the frequent ones are described here. A test compares the counts with those of a training.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]

MAX_TEMPLATE_CHARACTERS = 262_144  # a training refuses longer ones
# What a template may add to conversations; a training refuses one that adds more.
MAX_ADDED_CHARACTERS = 1_000_000
MAX_GROWTH = 20
# What rendering raises: the template's own message, or what its operations raise for values that it did not expect.
TEMPLATE_ERRORS = (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
SPACES = re.compile(r"\s*")
QUESTION, ANSWER = "Hello", "Good day"
TEST_CONVERSATION: list[dict[str, Any]] = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]


class TemplateProblem(ValueError):
    """A conversation cannot be rendered; the message says why."""


@dataclass(frozen=True)
class Conversation:
    """Messages, the tools that are offered, and which messages are learned."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    first: int = 0  # index of the first message that may be learned
    asks: bool = False  # ends with the start of an answer


@dataclass(frozen=True)
class ChatText:
    """A rendered conversation. `spans` are the answers to learn, with their ends; None if they cannot be found."""

    text: str
    spans: tuple[tuple[int, int], ...] | None


@dataclass(frozen=True)
class NeutralForm:
    """How a neutral template writes turns."""

    tokens: tuple[str, ...]  # that the tokenizer must have
    turn: str = ""  # with {role} and {content}
    roles: tuple[tuple[str, str], ...] = ()  # other names of roles
    system_in_question: bool = False  # the system message begins the first question
    is_trimmed: bool = False
    begins_with_bos: bool = False
    is_known: bool = True  # otherwise only the contents are counted


GEMMA3 = NeutralForm(
    ("<start_of_turn>", "<end_of_turn>"),
    "<start_of_turn>{role}\n{content}<end_of_turn>\n",
    (("assistant", "model"),),
    system_in_question=True,
    is_trimmed=True,
    begins_with_bos=True,
)
LLAMA3 = NeutralForm(
    ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>",
    is_trimmed=True,
    begins_with_bos=True,
)
CHATML = NeutralForm(("<|im_start|>", "<|im_end|>"), "<|im_start|>{role}\n{content}<|im_end|>\n")
PLAIN = NeutralForm(
    (), "{role}:\n{content}\n\n", (("user", "User"), ("system", "System"), ("assistant", "Assistant")), begins_with_bos=True
)
# In the order in which a training tries them.
NEUTRAL_FORMS = (
    GEMMA3,
    NeutralForm(("<|turn>", "<turn|>"), is_known=False),
    LLAMA3,
    CHATML,
    NeutralForm(("<|user|>", "<|assistant|>", "<|end|>"), is_known=False),
    NeutralForm(("[gMASK]", "<sop>", "<|user|>", "<|assistant|>"), is_known=False),
    NeutralForm(("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"), is_known=False),
    NeutralForm(("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"), is_known=False),
    NeutralForm(("[INST]", "[/INST]"), is_known=False),
    PLAIN,
)


class TemplateRenderer:
    """Renders with the base's own chat template."""

    def __init__(self, template: str, special_tokens: Mapping[str, Any], *, content_parts: bool = False) -> None:
        self._template = template
        self._special_tokens = dict(special_tokens)
        self._content_parts = content_parts

    def render(self, conversations: Sequence[Conversation]) -> list[str]:
        """The texts of conversations without tools, which end alike. Raises TemplateProblem."""
        from transformers.utils.chat_template_utils import render_jinja_template

        prepared = [[self._prepare(message) for message in each.messages] for each in conversations]
        tools, asks = conversations[0].tools, conversations[0].asks
        try:
            texts, _ = render_jinja_template(
                conversations=prepared,
                tools=tools or None,
                chat_template=self._template,
                add_generation_prompt=asks,
                **self._special_tokens,
            )
        except MemoryError as error:
            raise TemplateProblem("it takes too much memory") from error
        except TEMPLATE_ERRORS as error:  # often the template's own message, such as: System role not supported
            raise TemplateProblem(str(error)) from error
        limit = MAX_ADDED_CHARACTERS + MAX_GROWTH * sum(
            len(str(message)) for each in conversations for message in [*each.messages, each.tools]
        )
        if sum(map(len, texts)) > limit:
            raise TemplateProblem("it makes an implausibly long text of a conversation")
        return list(texts)

    def _prepare(self, message: Message) -> dict[str, Any]:
        prepared = {key: value for key, value in message.items() if value is not None and key != "weight"}
        if prepared.get("tool_calls"):
            prepared.setdefault("content", "")
        if self._content_parts and isinstance(prepared.get("content"), str):
            prepared["content"] = [{"type": "text", "text": prepared["content"]}]
        return prepared


class NeutralRenderer:
    """Renders in one of the neutral forms."""

    def __init__(self, form: NeutralForm, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._form = form
        has_bos = form.begins_with_bos or _adds_bos(tokenizer)
        self._bos = str(tokenizer.bos_token) if has_bos and tokenizer.bos_token is not None else ""
        self._eos = str(tokenizer.eos_token or "")

    def render(self, conversations: Sequence[Conversation]) -> list[str]:
        """The texts of conversations. Raises TemplateProblem for tools, which no neutral form has."""
        return [self._render(conversation) for conversation in conversations]

    def _render(self, conversation: Conversation) -> str:
        form, messages = self._form, conversation.messages
        if conversation.tools or any(message["role"] == "tool" or message.get("tool_calls") for message in messages):
            raise TemplateProblem("it has no tools")
        system, texts = "", [self._bos]
        if form.system_in_question and messages[0]["role"] == "system":
            system, messages = _read_content(messages[0]) + "\n\n", messages[1:]
        for number, message in enumerate(messages):
            content = _read_content(message)
            if form.is_trimmed:
                content = content.strip()
            if form is PLAIN and message["role"] == "assistant":
                content += self._eos
            turn = self._open(message["role"]) + (system if number == 0 else "") + content + self._close
            is_end = form is PLAIN and number + 1 == len(messages) and message["role"] == "assistant"
            texts.append(turn.removesuffix("\n\n") if is_end else turn)
        return "".join(texts) + (self._open("assistant") if conversation.asks else "")

    def _open(self, role: str) -> str:
        return self._form.turn.partition("{content}")[0].replace("{role}", dict(self._form.roles).get(role, role))

    @property
    def _close(self) -> str:
        return self._form.turn.partition("{content}")[2]


Renderer = TemplateRenderer | NeutralRenderer


class AnswerFinder:
    """Finds the answers in rendered conversations, by what the renderer writes before and after an answer.

    `ending` is what ends an answer, without spaces; empty if that is not known.
    """

    def __init__(self, renderer: Renderer) -> None:
        self._opening: str | None = None
        self._lead = self.ending = ""
        try:
            (plain,) = renderer.render([Conversation(TEST_CONVERSATION[:1])])
            (asked,) = renderer.render([Conversation(TEST_CONVERSATION[:1], asks=True)])
            (answered,) = renderer.render([Conversation(TEST_CONVERSATION)])
        except TemplateProblem:  # a template that requires a system message, for example
            return
        if answered.startswith(asked):
            self._opening = asked[_count_shared_start(asked, plain) :] or answered.partition(QUESTION)[2].partition(ANSWER)[0] or None
            lead, _, ending = answered[len(asked) :].partition(ANSWER)
            self._lead, self.ending = lead, ending.rstrip()

    def find(self, conversation: Conversation, text: str) -> tuple[tuple[int, int], ...] | None:
        """The spans to learn; None if they cannot be found."""
        if self._opening is None:
            return None
        spans: list[tuple[int, int]] = []
        position = 0
        for number, message in enumerate(conversation.messages):
            if message["role"] != "assistant":
                continue
            content = message.get("content")
            start = text.find(self._opening, position)
            if start < 0 or not isinstance(content, str) or message.get("tool_calls"):
                return None
            start += len(self._opening)
            position = self._find_end(text, start, content)
            if position < 0:
                return None
            if number >= conversation.first and message.get("weight") != 0:
                spans.append((start, position))
        return tuple(spans)

    def _find_end(self, text: str, start: int, content: str) -> int:
        """Where an answer ends, with its end of turn and the spaces after it; -1 if it is not there."""
        after_lead = start + len(self._lead) if text.startswith(self._lead, start) else start
        for said in (content, content.strip()):
            found = text.find(said, after_lead)
            if found >= 0:
                break
        else:
            return -1
        end = found + len(said)
        if self.ending and text.startswith(self.ending, end):
            end += len(self.ending)
        spaces = SPACES.match(text, end)
        return spaces.end() if spaces else end


def choose_renderer(tokenizer: "PreTrainedTokenizerBase", sample: Sequence[Conversation]) -> Renderer | None:
    """What renders the conversations as a training does, tried on some of them; None if nothing here does. Raises TemplateProblem."""
    if not tokenizer.chat_template:
        single = {token.content for token in tokenizer.added_tokens_decoder.values()}
        form = next(form for form in NEUTRAL_FORMS if single.issuperset(form.tokens))
        return NeutralRenderer(form, tokenizer) if form.is_known else None
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        raise TemplateProblem("the base has several chat templates and no default") from error
    if len(template) > MAX_TEMPLATE_CHARACTERS:
        raise TemplateProblem(f"it has {len(template):,} characters; a training takes {MAX_TEMPLATE_CHARACTERS:,}")
    problem = TemplateProblem("it leaves out the content of messages")
    for content_parts in (False, True):
        renderer = TemplateRenderer(template, tokenizer.special_tokens_map, content_parts=content_parts)
        try:
            if all(_has_contents(each, *renderer.render([each])) for each in sample or [Conversation(TEST_CONVERSATION)]):
                return renderer
        except TemplateProblem as error:
            problem = error
    raise problem


def has_reasoning(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the base's template writes reasoning, which it may leave out of earlier answers."""
    return "<think>" in str(tokenizer.chat_template or "")


def _adds_bos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def _read_content(message: Message) -> str:
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    if any(part.get("type") != "text" for part in content):
        raise TemplateProblem("it has no images")
    return "".join(part["text"] for part in content)


def _count_shared_start(one: str, other: str) -> int:
    """How many characters two texts have in common at their start."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _has_contents(conversation: Conversation, text: str) -> bool:
    """Whether a rendered text has what is said. Reasoning may be written otherwise."""
    contents = (message.get("content") for message in conversation.messages)
    return all(content.strip() in text for content in contents if isinstance(content, str) and "think>" not in content)
