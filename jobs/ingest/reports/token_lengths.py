"""How many tokens rows have, as a training counts them: with the base's tokenizer, its chat template, and the tokens around a text.

A text of a control token in a row stays text, as in a training. Rows are encoded in batches, on all cores.
"""

import json
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jobs.ingest.reports.chat_texts import (
    AnswerFinder,
    ChatText,
    Conversation,
    NeutralRenderer,
    Renderer,
    TemplateProblem,
    choose_renderer,
    has_reasoning,
)
from jobs.ingest.reports.control_tokens import ControlTokens
from jobs.ingest.reports.row_texts import Row, read_texts
from jobs.ingest.reports.tokenizer_files import digest_tokenizer, load_tokenizer
from schema.dataset import TRAIN_SPLIT
from schema.ingestion import TokenLengths

if TYPE_CHECKING:
    from tokenizers import Encoding

BATCH_ROWS = 256
BATCH_BYTES = 4 << 20  # a batch of long rows has fewer
SAMPLE_ROWS = 16  # of each split, on which the template is tried
ESTIMATED_TURN_TOKENS = 5  # that a template adds to a message, where it cannot be rendered
LONGEST_ROWS = 64
PERCENTILES = (50, 90, 95, 99, 100)
CLIPPED_LENGTHS = tuple(256 << n for n in range(10))  # 256 to 131,072


class RowTokens(NamedTuple):
    """The tokens of one row: its length, of a pair that of the longer answer, and how many are learned."""

    length: int
    learned: int | None


def count_tokens(splits: Mapping[str, Path], base_model_id: str, tokenizer_folder: Path, max_seq_length: int | None = None) -> TokenLengths:
    """Count the tokens of every row. Raises UnusableTokenizer if the tokenizer cannot be read."""
    counter = TokenCounter(splits, base_model_id, tokenizer_folder)
    totals = TokenTotals()
    for split, path in splits.items():
        for batch in _iter_batches(path):
            totals.add(split, counter.count(batch))
    return counter.describe(totals, max_seq_length)


class TokenTotals:
    """Lengths of rows, by how many rows have each: memory grows with the different lengths only."""

    def __init__(self) -> None:
        self.rows_by_length: dict[str, Counter[int]] = {}
        self.learned: int | None = 0  # of the training split

    def add(self, split: str, rows: Iterable[RowTokens]) -> None:
        """Add rows of a split."""
        lengths = self.rows_by_length.setdefault(split, Counter())
        for row in rows:
            lengths[row.length] += 1
            if split == TRAIN_SPLIT and self.learned is not None:
                self.learned = None if row.learned is None else self.learned + row.learned


class TokenCounter:
    """Counts the tokens of rows. What could not be counted exactly is remembered."""

    def __init__(self, splits: Mapping[str, Path], base_model_id: str, tokenizer_folder: Path) -> None:
        self._base_model_id = base_model_id
        self._tokenizer = load_tokenizer(tokenizer_folder, base_model_id)
        self._digest = digest_tokenizer(tokenizer_folder)
        self._backend = self._tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._control_tokens = ControlTokens(self._tokenizer)
        self._problems = Counter[str]()  # rows, by why their tokens are estimated
        self._has_earlier_reasoning = False
        sample = [row for path in splits.values() for row in _read_sample(path)]
        self._renderer = self._choose_renderer(sample)
        self._finder = AnswerFinder(self._renderer) if self._renderer else None
        self._keeps_control_tokens = self._are_rendered_texts(sample)
        self._in_pieces = self._depend_on_answers(sample)
        self._problems.clear()  # of the sample; its rows are counted with the others

    def count(self, rows: Sequence[Row]) -> list[RowTokens]:
        """The tokens of each row."""
        if rows and "text" in rows[0] and "messages" not in rows[0]:
            return self._count_texts([str(row["text"]) for row in rows])
        conversations = [list(_iter_conversations(row)) for row in rows]
        counted = iter(self._count_conversations([each for row in conversations for each in row]))
        return [_join(list(islice(counted, len(row)))) for row in conversations]

    def describe(self, totals: TokenTotals, max_seq_length: int | None) -> TokenLengths:
        """What was counted."""
        lengths = sum(totals.rows_by_length.values(), Counter[int]())
        ordered = sorted(lengths.items())
        rows, total = lengths.total(), sum(length * count for length, count in ordered)
        note = self._describe_problems()
        return TokenLengths(
            base_model_id=self._base_model_id,
            tokenizer_digest=self._digest,
            exact=not note,
            note=note,
            rows=rows,
            total_tokens=total,
            mean=round(total / rows, 2) if rows else 0.0,
            percentiles={str(percent): _find_percentile(ordered, rows, percent) for percent in PERCENTILES},
            histogram=make_histogram(ordered),
            longest=tuple(islice((length for length, count in reversed(ordered) for _ in range(count)), LONGEST_ROWS)),
            max_seq_length=max_seq_length,
            truncated_rows=None if max_seq_length is None else sum(count for length, count in ordered if length > max_seq_length),
            split_tokens={name: sum(length * count for length, count in each.items()) for name, each in totals.rows_by_length.items()},
            clipped_tokens=_clip(totals.rows_by_length.get(TRAIN_SPLIT, Counter())),
            learned_tokens=totals.learned,
        )

    # --- what renders the rows ---

    def _choose_renderer(self, sample: Sequence[Row]) -> Renderer | None:
        conversations = [each for row in sample for each in _iter_conversations(row)]
        try:
            renderer = choose_renderer(self._tokenizer, [each for each in conversations if not _has_images(each)])
        except TemplateProblem as error:
            self._template_problem = str(error)
            return None
        self._template_problem = "its base has none, and the form that a training gives it is not known here"
        return renderer

    def _are_rendered_texts(self, sample: Sequence[Row]) -> bool:
        """Whether texts are conversations that the template rendered: then their control tokens are meant."""
        texts = [str(row["text"]) for row in sample if "text" in row and "messages" not in row]
        ending = self._finder.ending.strip() if self._finder else ""
        return bool(texts and self._tokenizer.chat_template and ending) and all(ending in text for text in texts)

    def _depend_on_answers(self, sample: Sequence[Row]) -> bool:
        """Whether the tokens of a prompt depend on the answer, so that a training tokenizes them apart."""
        conversations = [self._hide(each) for row in sample for each in _iter_conversations(row)]
        for chat in self._render(conversations):
            for start, _ in (chat.spans or ()) if chat else ():
                if chat is None or chat.text[start : start + 1].isspace():
                    continue
                ids, prompt = (self._backend.encode(text, add_special_tokens=False).ids for text in (chat.text, chat.text[:start]))
                if ids[: len(prompt)] != prompt:
                    return True
        return False

    def _describe_problems(self) -> str:
        problems = [
            f"{count:,} {'row' if count == 1 else 'rows'}: {reason}"
            for reason, count in sorted(self._problems.items(), key=lambda item: -item[1])
        ]
        if self._has_earlier_reasoning:
            problems.append("the chat template writes reasoning, which a training may render otherwise in earlier answers")
        return f"token counts are estimates ({'; '.join(problems[:3])})" if problems else ""

    # --- conversations ---

    def _count_conversations(self, conversations: Sequence[Conversation]) -> list[RowTokens]:
        hidden = [self._hide(conversation) for conversation in conversations]
        texts = self._render(hidden)
        counts = iter(self._count_chat_texts([text for text in texts if text is not None]))
        return [next(counts) if text is not None else self._estimate(each) for each, text in zip(conversations, texts, strict=True)]

    def _hide(self, conversation: Conversation) -> Conversation:
        """With control tokens in texts hidden, and images without their data."""
        messages = [_drop_image_data(message) for message in self._control_tokens.hide(conversation.messages)]
        return Conversation(messages, self._control_tokens.hide(conversation.tools), conversation.first, conversation.asks)

    def _render(self, conversations: Sequence[Conversation]) -> list[ChatText | None]:
        """The texts; None where a conversation cannot be rendered."""
        if self._renderer is None or self._finder is None:
            self._problems[self._template_problem] += len(conversations)
            return [None] * len(conversations)
        texts: list[ChatText | None] = []
        is_alike = all(not each.tools and each.asks == conversations[0].asks for each in conversations)
        for group in [conversations] if is_alike and conversations else [[each] for each in conversations]:
            try:
                rendered: list[str | None] = [*self._renderer.render(group)]
            except TemplateProblem:
                rendered = [self._render_alone(each) for each in group]
            texts += [
                None if text is None else ChatText(text, self._finder.find(each, text)) for each, text in zip(group, rendered, strict=True)
            ]
        for conversation in conversations:
            self._note_images_and_reasoning(conversation)
        return texts

    def _render_alone(self, conversation: Conversation) -> str | None:
        assert self._renderer is not None
        try:
            return self._renderer.render([conversation])[0]
        except TemplateProblem as error:
            owner = "the chat template that a training takes" if isinstance(self._renderer, NeutralRenderer) else "the base's chat template"
            self._problems[f"{owner} rejects them: {str(error)[:200]}"] += 1
            return None

    def _note_images_and_reasoning(self, conversation: Conversation) -> None:
        if _has_images(conversation):
            self._problems["the tokens of images are not counted"] += 1
        answers = sum(message["role"] == "assistant" for message in conversation.messages)
        self._has_earlier_reasoning |= answers > 1 and self._writes_reasoning

    @cached_property
    def _writes_reasoning(self) -> bool:
        return has_reasoning(self._tokenizer)

    def _count_chat_texts(self, texts: Sequence[ChatText]) -> list[RowTokens]:
        encodings = self._backend.encode_batch([each.text for each in texts], add_special_tokens=False)
        return [self._count_chat_text(text, encoding) for text, encoding in zip(texts, encodings, strict=True)]

    def _count_chat_text(self, chat: ChatText, encoding: "Encoding") -> RowTokens:
        spans = chat.spans
        offsets: list[tuple[int, int]] = encoding.offsets if spans else []
        if (
            (spans and self._in_pieces)
            or self._control_tokens.has_hidden(chat.text)
            or any(_is_crossed(offsets, start) for start, _ in spans or ())
        ):
            return self._count_in_pieces(chat)
        learned = None if spans is None else sum(bisect_left(offsets, (end,)) - bisect_left(offsets, (start,)) for start, end in spans)
        return RowTokens(len(encoding), learned)

    def _count_in_pieces(self, chat: ChatText) -> RowTokens:
        """No token crosses the start of an answer; hidden control tokens are texts of their own."""
        length = learned = position = 0
        for start, end in [*(chat.spans or ()), (len(chat.text), len(chat.text))]:
            length += self._control_tokens.count(self._backend, chat.text[position:start])
            answer = self._control_tokens.count(self._backend, chat.text[start:end])
            length, learned, position = length + answer, learned + answer, end
        return RowTokens(length, None if chat.spans is None else learned)

    def _estimate(self, conversation: Conversation) -> RowTokens:
        """The tokens of the contents, and what templates usually add."""
        contents = [text for message in conversation.messages for text in (read_texts({"messages": [message]}).everything,)]
        if conversation.tools:
            contents.append(json.dumps(conversation.tools, ensure_ascii=False))
        encodings = self._backend.encode_batch(contents, add_special_tokens=False)
        return RowTokens(sum(len(encoding) + ESTIMATED_TURN_TOKENS for encoding in encodings), None)

    # --- texts ---

    def _count_texts(self, texts: Sequence[str]) -> list[RowTokens]:
        """Texts with BOS and EOS, which are not added twice to a rendered conversation."""
        hidden = texts if self._keeps_control_tokens else [self._control_tokens.hide(text) for text in texts]
        encodings = self._backend.encode_batch(hidden, add_special_tokens=False)
        return [self._count_text(text, encoding) for text, encoding in zip(hidden, encodings, strict=True)]

    def _count_text(self, text: str, encoding: "Encoding") -> RowTokens:
        has_bos = self._tokenizer.bos_token_id is not None
        if not self._keeps_control_tokens:
            is_hidden = self._control_tokens.has_hidden(text)
            length = (self._control_tokens.count(self._backend, text) if is_hidden else len(encoding)) + 1
            return RowTokens(length + has_bos, length)
        ids = encoding.ids
        ids = ids[1:] if has_bos and ids[:1] == [self._tokenizer.bos_token_id] else ids
        last = next((token for token in reversed(ids) if str(self._tokenizer.decode([token])).strip()), None)
        length = len(ids) + (last not in self._stop_token_ids)
        return RowTokens(length + has_bos, length)

    @cached_property
    def _stop_token_ids(self) -> set[object]:
        """That end a rendered conversation: what the template writes, and the tokens on which the base stops."""
        path = Path(self._tokenizer.name_or_path) / "generation_config.json"
        listed = json.loads(path.read_bytes()).get("eos_token_id") if path.is_file() else None
        ending = self._backend.encode(self._finder.ending if self._finder else "", add_special_tokens=False).ids
        return {*ending[:1], self._tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])}


def make_histogram(ordered: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Rows by the smallest of 1, 2, 3, 4, 6, 8, 12, … that is not below their length; from the first to the last with rows."""
    buckets = Counter[int]()
    for length, count in ordered:
        size = 1 << max(0, length - 1).bit_length()
        half = size - size // 4  # 3/4 of a power of 2 is halfway between two
        buckets[half if size >= 4 and length <= half else size] += count  # 3 is the first halfway
    return tuple(sorted(buckets.items()))


def _iter_batches(path: Path) -> Iterator[list[Row]]:
    batch: list[Row] = []
    size = 0
    with path.open("rb") as lines:
        for line in lines:
            batch.append(json.loads(line))
            size += len(line)
            if len(batch) == BATCH_ROWS or size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _read_sample(path: Path) -> list[Row]:
    with path.open("rb") as lines:
        return [json.loads(line) for line in islice(lines, SAMPLE_ROWS)]


def _iter_conversations(row: Row) -> Iterator[Conversation]:
    """What a training renders of a row: one conversation, of a pair two."""
    tools = row.get("tools")
    if "messages" in row:
        yield Conversation(row["messages"], tools)
        return
    if "prompt" not in row:
        return
    prompt = _as_messages(row["prompt"], "user")
    answers = [row[name] for name in ("completion", "chosen", "rejected") if name in row]
    for answer in answers:
        yield Conversation([*prompt, *_as_messages(answer, "assistant")], tools, len(prompt))
    if not answers:
        yield Conversation(prompt, tools, len(prompt), asks=True)


def _as_messages(content: str | list[dict[str, Any]], role: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": content}] if isinstance(content, str) else content


def _join(parts: list[RowTokens]) -> RowTokens:
    learned = [part.learned for part in parts if part.learned is not None]
    return RowTokens(max(part.length for part in parts), sum(learned) if len(learned) == len(parts) else None)


def _has_images(conversation: Conversation) -> bool:
    return any(
        part["type"] == "image"
        for message in conversation.messages
        if isinstance(message.get("content"), list)
        for part in message["content"]
    )


def _drop_image_data(message: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(message.get("content"), list):
        return message
    return message | {"content": [{"type": "image"} if part["type"] == "image" else part for part in message["content"]]}


def _is_crossed(offsets: list[tuple[int, int]], border: int) -> bool:
    """Whether a token starts before the border and ends after it."""
    after = bisect_left(offsets, (border,))
    return after > 0 and offsets[after - 1][1] > border


def _find_percentile(ordered: list[tuple[int, int]], rows: int, percent: int) -> int:
    """The length that so many percent of the rows do not exceed."""
    needed, passed = -(-rows * percent // 100), 0
    for length, count in ordered:
        passed += count
        if passed >= needed:
            return length
    return 0


def _clip(lengths: Mapping[int, int]) -> dict[str, int]:
    return {str(limit): sum(min(length, limit) * count for length, count in lengths.items()) for limit in CLIPPED_LENGTHS}
