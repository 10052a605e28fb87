"""A real data set that every machine has: what the functions of Python's standard library do, from their docstrings.

    python infra/stdlib_docstrings.py rows.jsonl [--rows 650]

Each row is a question in one form, and the docstring's first paragraph as the answer.
"""

import argparse
import importlib
import inspect
import json
import random
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

MODULES = """
argparse array ast asyncio base64 bisect bz2 calendar cmath codecs collections colorsys configparser contextlib copy csv
dataclasses datetime decimal difflib dis email.message email.utils enum fileinput fnmatch fractions functools getpass gettext
glob graphlib gzip hashlib heapq hmac html http.client http.cookies imaplib importlib.metadata inspect io ipaddress itertools json
keyword linecache locale logging lzma mailbox math mimetypes multiprocessing.pool numbers operator os os.path pathlib pickle
pickletools platform plistlib pprint queue random re reprlib sched secrets selectors shelve shlex shutil signal smtplib socket
socketserver sqlite3 ssl stat statistics string struct subprocess symtable tarfile tempfile textwrap threading time timeit
tokenize traceback types typing unicodedata unittest unittest.mock urllib.error urllib.parse urllib.request uuid venv warnings wave
weakref webbrowser xml.dom.minidom xml.etree.ElementTree xml.sax zipapp zipfile zlib zoneinfo
""".split()  # noqa: SIM905  # a list of a hundred names in quotes is not easier to read
SHORTEST, LONGEST = 40, 240  # characters of an answer: enough to say something, short enough for a laptop
UNWANTED = re.compile(r"deprecated|obsolete|internal|undocumented|^see |^same as|^alias|initialize self|return repr", re.IGNORECASE)
SIGNATURE = re.compile(r"^[\w.]+\([^)]*\)\s*(->\s*[\w\[\], .]+)?\s*(--|:)?\s*")


def main() -> None:
    """Write the rows and say how many."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, default=650)
    arguments = parser.parse_args()
    pairs = sorted(question_and_answer())
    random.Random(42).shuffle(pairs)
    rows = pairs[: arguments.rows]
    with arguments.out.open("w", encoding="utf-8") as out:
        for question, answer in rows:
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            out.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    print(f"{len(rows)} questions and answers, of {len(pairs)} found, in {arguments.out}")


def question_and_answer() -> Iterator[tuple[str, str]]:
    """One pair for every public function, class and method that explains itself; no answer twice."""
    seen: set[str] = set()
    for name in MODULES:
        for path, thing in _members(_quiet_import(name)):
            answer = _first_paragraph(inspect.getdoc(thing) or "")
            if SHORTEST <= len(answer) <= LONGEST and not UNWANTED.search(answer) and answer not in seen:
                seen.add(answer)
                yield f"What does {path} do?", answer


def _quiet_import(name: str) -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


def _members(module: ModuleType) -> Iterator[tuple[str, object]]:
    for name in sorted(getattr(module, "__all__", None) or dir(module)):
        thing = getattr(module, name, None)
        if name.startswith("_") or not callable(thing) or isinstance(thing, ModuleType):
            continue
        yield f"{module.__name__}.{name}", thing
        if inspect.isclass(thing) and not issubclass(thing, BaseException):
            for method in sorted(vars(thing)):
                if not method.startswith("_") and callable(getattr(thing, method, None)):
                    yield f"{module.__name__}.{name}.{method}", getattr(thing, method)


def _first_paragraph(docstring: str) -> str:
    """The first paragraph in one line, without the signature that C functions begin with."""
    paragraphs = [" ".join(part.split()) for part in docstring.split("\n\n")]
    first = SIGNATURE.sub("", paragraphs[0]) if paragraphs else ""
    if not first and len(paragraphs) > 1:
        first = paragraphs[1]
    first = (first[:1].upper() + first[1:]).replace("``", "`")
    return first if first.endswith((".", "!")) else ""


if __name__ == "__main__":
    main()
