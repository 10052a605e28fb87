"""Makes a real dataset that needs no download: what the functions of Python's standard library do, from their docstrings.

    python infra/stdlib_docstrings.py rows.jsonl [--rows 650]

Each row asks "What does X do?" and answers with the first paragraph of the docstring. Only functions and methods are used, and only
answers that begin with a verb. The same Python version gives the same rows.
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
""".split()  # noqa: SIM905  # a hundred quoted names would be harder to read
MODULE_ALIASES = {
    "os": ("os", "posix", "nt"),
    "os.path": ("posixpath", "ntpath", "genericpath"),
}  # modules in which their functions are defined
MIN_ANSWER_CHARS, MAX_ANSWER_CHARS = 40, 160  # long enough to be useful, short enough for training on a laptop
UNWANTED_PATTERN = re.compile(
    r"deprecat|obsolete|internal|undocumented|like |same as|alias|equivalent|similar to|delegate|override|subclass|callback|hook|backward"
    r"|for details|see |this (method|function|class)|the (method|function|class) |\bself\b|[<>=]{2,}|:(param|return)|[^ -~]",
    re.IGNORECASE,
)
SIGNATURE_PATTERN = re.compile(r"^[\w.]+\([^)]*\)\s*(->\s*[\w\[\], .]+)?\s*(--|:)?\s*")
# Verbs that an answer may begin with. A list, because no rule distinguishes "Process one file." from "Process time for profiling."
ALLOWED_FIRST_WORDS = """
Accept Acquire Add Announce Append Apply Arrange Assert Attach Attempt Begin Block Calculate Call Change Check Choose Clean Clear Close
Collapse Collect Combine Commit Compare Compile Compress Compute Concatenate Conditionally Connect Construct Convert Copy Create Decode
Decompress Decrement Delay Delete Deserialize Detect Determine Disable Disassemble Disconnect Divide Do Duplicate Emit Enable Encode
Encrypt Ensure Evaluate Execute Expand Extract Fail Fetch Fill Find Finish Flush Force Fork Format Generate Get Give Handle Identify
Increment Incrementally Indent Indicate Initialize Insert Install Invoke Isolate Issue Iterate Join Kill Load Locate Log Look Lookup Make
Mark Match Merge Move Normalize Open Parse Perform Permanently Place Pop Prepare Print Produce Push Put Quote Raise Read Receive
Reconfigure Recursively Register Release Remove Rename Reorder Replace Represent Request Reset Resolve Restore Retrieve Return Reverse
Rotate Round Run Scan Schedule Search Send Separate Serialize Set Show Shuffle Shutdown Skip Split Start Stop Store Strip Submit Summarize
Swap Tell Terminate Test Tokenize Transform Translate Truncate Try Turn Unpack Unregister Unset Update Upgrade Verify Wait Wake Walk Wrap
Write Yield
""".split()  # noqa: SIM905  # as above


def main() -> None:
    """Write the rows and print how many there are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, default=650)
    args = parser.parse_args()
    pairs = sorted(generate_question_answer_pairs())
    random.Random(42).shuffle(pairs)
    rows = pairs[: args.rows]
    with args.out.open("w", encoding="utf-8") as out:
        for question, answer in rows:
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            out.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    print(f"{len(rows)} of {len(pairs)} questions and answers are in {args.out}")


def generate_question_answer_pairs() -> Iterator[tuple[str, str]]:
    """One pair for every public function and method with a usable docstring; no answer twice."""
    seen: set[str] = set()
    for name in MODULES:
        for path, function in _functions(name):
            answer = _first_paragraph(inspect.getdoc(function) or "")
            if answer not in seen and _is_usable_answer(answer):
                seen.add(answer)
                yield f"What does {path} do?", answer


def _is_usable_answer(answer: str) -> bool:
    return (
        MIN_ANSWER_CHARS <= len(answer) <= MAX_ANSWER_CHARS
        and answer.partition(" ")[0] in ALLOWED_FIRST_WORDS
        and not UNWANTED_PATTERN.search(answer)
    )


def _import_or_empty(name: str) -> ModuleType:
    """The module, or an empty one if this Python was built or packaged without it, as may happen to lzma, sqlite3 and venv."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            return ModuleType(name)


def _functions(module_name: str) -> Iterator[tuple[str, object]]:
    """The functions, and the methods of the classes, that are defined in the module and not just imported there."""
    module = _import_or_empty(module_name)
    for name in sorted(getattr(module, "__all__", None) or dir(module)):
        member = getattr(module, name, None)
        if name.startswith("_") or getattr(member, "__name__", None) != name or not _is_defined_in(member, module_name):
            continue
        if inspect.isroutine(member):
            yield f"{module_name}.{name}", member
        elif inspect.isclass(member) and not issubclass(member, BaseException):
            for method in sorted(vars(member)):
                if not method.startswith("_") and inspect.isroutine(getattr(member, method, None)):
                    yield f"{module_name}.{name}.{method}", getattr(member, method)


def _is_defined_in(member: object, module_name: str) -> bool:
    """Whether a member is defined in the package, or in its C implementation, whose name begins with an underscore."""
    package = module_name.partition(".")[0]
    defined_in = str(getattr(member, "__module__", None) or package).partition(".")[0].lstrip("_")
    return defined_in in MODULE_ALIASES.get(module_name, (package,))


def _first_paragraph(docstring: str) -> str:
    """The first paragraph on one line, without the signature at the start of C functions' docstrings, and without emphasis marks."""
    paragraphs = [" ".join(part.split()) for part in docstring.split("\n\n")]
    first = SIGNATURE_PATTERN.sub("", paragraphs[0]) if paragraphs else ""
    if not first and len(paragraphs) > 1:
        first = paragraphs[1]
    first = re.sub(r"\*(\w+)\*", r"\1", first[:1].upper() + first[1:]).replace("``", "`")
    return first if first.endswith((".", "!")) else ""


if __name__ == "__main__":
    main()
