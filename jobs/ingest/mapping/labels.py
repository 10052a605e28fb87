"""Labels and choices, in the spellings that files have."""

from jobs.ingest.rows.values import InvalidValue, Number, describe_type, preview

TRUE = frozenset(
    ("true", "1", "1.0", "+1", "yes", "y", "t", "good", "thumbs_up", "thumbsup", "thumbs up", "up", "like", "liked", "positive")
)
FALSE = frozenset(
    (
        "false",
        "0",
        "0.0",
        "-1",
        "no",
        "n",
        "f",
        "bad",
        "thumbs_down",
        "thumbsdown",
        "thumbs down",
        "down",
        "dislike",
        "disliked",
        "negative",
    )
)
EMOJI = {"👍": True, "👎": False}


def find_label(value: object) -> bool | None:
    """What a label says; None if it is no label."""
    if isinstance(value, bool):
        return value
    text = value.literal if isinstance(value, Number) else value
    if not isinstance(text, str):
        return None
    spelled = text.strip().lower()
    return True if spelled in TRUE else False if spelled in FALSE else EMOJI.get(spelled)


def read_label(value: object, field: str) -> bool:
    """What a label says. Raises InvalidValue."""
    label = find_label(value)
    if label is None:
        if value is None or (isinstance(value, str) and not value.strip()):
            raise InvalidValue(field, "is empty; write true for a good completion, false for a bad one", "empty")
        described = preview(value) if isinstance(value, str) else value.literal[:20] if isinstance(value, Number) else describe_type(value)
        known = "true and false, 1 and 0, yes and no, good and bad, thumbs_up and thumbs_down"
        raise InvalidValue(field, f"is {described}; labels are {known}", "wrong_value")
    return label


def find_choice(value: object, first: str, second: str) -> int | None:
    """Which of two columns a value names, 0 or 1: by their names, or by what these differ in at their ends."""
    text = value.literal if isinstance(value, Number) else value
    if not isinstance(text, str):
        return None
    spelled = text.strip().casefold()
    ends = _endings(first.casefold(), second.casefold())
    for index, (name, end) in enumerate(zip((first.casefold(), second.casefold()), ends, strict=True)):
        if spelled in (name, end) or spelled.endswith((f"_{end}", f" {end}", f"-{end}")):
            return index
    return None


def read_choice(value: object, first: str, second: str, field: str) -> int:
    """Which of two columns a value names. Raises InvalidValue."""
    choice = find_choice(value, first, second)
    if choice is None:
        described = preview(value) if isinstance(value, str) else value.literal[:20] if isinstance(value, Number) else describe_type(value)
        ends = " or ".join(preview(end) for end in _endings(first, second))
        raise InvalidValue(
            field, f"is {described}, which names no answer; it must be {ends}; drop rows without a better answer", "wrong_value"
        )
    return choice


def _endings(first: str, second: str) -> tuple[str, str]:
    """What two names differ in, from the last separator before the difference."""
    shared = 0
    while shared < min(len(first), len(second)) and first[shared] == second[shared]:
        shared += 1
    while shared and first[shared - 1].isalnum():
        shared -= 1
    return first[shared:], second[shared:]
