"""The terms that Firestore finds jobs by: beginnings of the words of a name, ends of an id, and pairs of metadata.

Its indexes hold whole values only, so a part within a word is not found, and one query asks for one kind of term.
"""

import re

from schema.job import Job
from service.core.job_lists import MIN_ID_ENDING, JobQuery, fold_text, pair_term, split_search

MAX_TERM_CHARS = 12  # of a word's beginning and of an id's end
MAX_PAIR_CHARS = 200  # of a pair's beginning: an index holds at most 1,500 bytes of a value
MAX_WORDS = 32  # of a name that can be searched for

_WORD = re.compile(r"[^\W_]+")


def list_search_terms(job: Job) -> list[str]:
    """What a job is found by. Each term starts with the tenant, as list filters do."""
    words = _WORD.findall(fold_text(job.job_name))[:MAX_WORDS]
    beginnings = (word[:length] for word in words for length in range(1, min(len(word), MAX_TERM_CHARS) + 1))
    job_id = fold_text(job.job_id)
    endings = (job_id[-length:] for length in range(MIN_ID_ENDING, min(len(job_id), MAX_TERM_CHARS) + 1))
    pairs = (pair_term(key, value)[:MAX_PAIR_CHARS] for key, value in job.metadata.items())
    return [f"{job.tenant_id}/{term}" for term in dict.fromkeys([*beginnings, *endings, *pairs])]


def find_search_terms(query: JobQuery) -> list[str]:
    """The terms of which every job that the query finds has at least one; none: any job may match."""
    if query.metadata:  # rarer than a word
        return [f"{query.tenant_id}/{pair_term(*query.metadata[0])[:MAX_PAIR_CHARS]}"]
    if query.search is None:
        return []
    part, ending = split_search(query.search)
    words = _WORD.findall(part) if part is not None else []
    if part is not None and not words:
        return []  # punctuation, which is in no term
    # Of several words of one length the last: only the first of a search can be a part within a word.
    terms = [max(reversed(words), key=len)[:MAX_TERM_CHARS]] if words else []
    if ending is not None:
        terms.append(ending[-MAX_TERM_CHARS:])
    return [f"{query.tenant_id}/{term}" for term in dict.fromkeys(terms)]


def needs_check(query: JobQuery) -> bool:
    """Whether a document that has a term of the query may not match it, so that it must be read."""
    return query.search is not None or len(query.metadata) > 1 or any(len(pair_term(*pair)) > MAX_PAIR_CHARS for pair in query.metadata)
