"""Which stored model a name may mean. Pure."""

import re
from collections.abc import Sequence
from difflib import SequenceMatcher, get_close_matches

MIN_TOKEN_RATIO = 0.75  # gema ~ gemma is 0.89; google ~ unsloth is 0.31
MIN_NAME_RATIO = 0.6
MAX_SUGGESTIONS = 3


def short_name(name: str) -> str:
    """The name without its owner."""
    return name.rpartition("/")[2]


def find_by_short_name(name: str, stored: Sequence[str]) -> list[str]:
    """The stored models that are called so, without regard to case, and to the owner where the name has none."""
    wanted = name.lower()
    return [each for each in stored if wanted in (each.lower(), short_name(each).lower())]


def find_meant(name: str, stored: Sequence[str]) -> list[str]:
    """The stored models that the name most likely means: written in another case, without the owner, or with a typo.

    A name with another version, size, suffix or owner is another model: google/gemma-3-270m-it is not a typo of google/gemma-3-270m.
    """
    return find_by_short_name(name, stored) or [each for each in stored if _is_typo(name.lower(), each.lower())][:MAX_SUGGESTIONS]


def suggest(name: str, stored: Sequence[str]) -> list[str]:
    """Stored models with similar names, the most similar first."""
    meant = find_meant(name, stored)
    by_key = {key.lower(): each for each in stored for key in (each, short_name(each))}
    close = get_close_matches(name.lower(), by_key, MAX_SUGGESTIONS * 2, MIN_NAME_RATIO)
    return list(dict.fromkeys([*meant, *(by_key[key] for key in close)]))[:MAX_SUGGESTIONS]


def describe_suggestions(names: Sequence[str]) -> str:
    """A question that names them, or nothing."""
    return f"did you mean {' or '.join(names)}?" if names else ""


def _is_typo(name: str, stored: str) -> bool:
    compared = stored if "/" in name else short_name(stored)
    parts, other_parts = re.split(r"[-/_.]", name), re.split(r"[-/_.]", compared)
    if len(parts) != len(other_parts):
        return re.sub(r"[-_.]", "", name) == re.sub(r"[-_.]", "", compared)  # gemma3-270m
    different = [(part, other) for part, other in zip(parts, other_parts, strict=True) if part != other]
    return len(different) == 1 and _is_misspelled(*different[0])


def _is_misspelled(word: str, other: str) -> bool:
    """A word with a digit is a version or a size: another one is not a typo."""
    return not re.search(r"\d", word + other) and SequenceMatcher(None, word, other).ratio() >= MIN_TOKEN_RATIO
