"""Finds gcloud commands in pages, in scripts and their comments, and in the messages of programs."""

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

PLACEHOLDER = "filled-in"  # replaces what a shell or a person fills in; valid as a project, a name and a path
PLACEHOLDER_PATTERN = re.compile(r"\$\([^()]*\)|\$\{[^{}]*\}|\$\w+|<[a-z-]+>|…|\bPROJECT_ID\b")


@dataclass(frozen=True)
class CommandLine:
    """A command and its location."""

    command: str
    path: str
    number: int


def find_in_text(text: str, path: str, groups: set[str]) -> Iterator[CommandLine]:
    """The commands in a page, a script or a build file. `groups` are gcloud's first words; other mentions are prose."""
    # Replace character by character, so that line numbers stay right.
    flat = re.sub(r"\\\n", "  ", text)
    flat = re.sub(r"`gcloud [^`]+`", lambda span: span[0].replace("\n", " "), flat)
    for match in re.finditer(rf"(?<![\w/.-])gcloud (?=(?:(?:alpha|beta) )?(?:{'|'.join(sorted(groups))})\b)", flat):
        yield CommandLine(extract_command(flat[match.start() :]), path, text.count("\n", 0, match.start()) + 1)


def find_in_python(source: str, path: str, groups: set[str]) -> Iterator[CommandLine]:
    """The commands in a program's strings."""
    tree = ast.parse(source)
    resolver = _StringResolver(tree)
    inside_fstrings = {
        id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node) if part is not node
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant | ast.JoinedStr) and id(node) not in inside_fstrings:
            for line in find_in_text(resolver.resolve(node), path, groups):
                yield CommandLine(line.command, path, node.lineno)


def extract_command(text: str) -> str:
    """The command at the start of the text, with placeholders replaced."""
    text = PLACEHOLDER_PATTERN.sub(PLACEHOLDER, text)
    quote = ""
    for index, character in enumerate(text):
        before, after = text[index - 1], text[index + 1 : index + 2]
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'" and before in " =(":
            quote = character
        elif _ends_command(character, before, after):
            text = re.sub(r" 2$", "", text[:index]) if character == ">" else text[:index]
            break
    words = shlex.split(text)
    return shlex.join(words[: words.index("or")] if "or" in words else words)


def _ends_command(character: str, before: str, after: str) -> bool:
    """Whether a character outside quotes ends a command: by the shell's rules, or as the end of the sentence or quotation around it."""
    sentence_ends = character in ".,:" and before != " " and not after.strip(" \n\"')")
    return character in "|;&<>)`\n\"'" or sentence_ends or (before == " " and character in "#(")


class _StringResolver:
    """Evaluates string expressions as far as possible: a name has the value last assigned above it in its function."""

    def __init__(self, tree: ast.Module) -> None:
        self._function_of: dict[int, ast.AST] = {}
        self._assigned: dict[tuple[ast.AST, str], list[ast.Assign]] = {}
        for function in ast.walk(tree):  # outer functions first, so that the innermost one wins
            if isinstance(function, ast.Module | ast.FunctionDef):
                self._function_of |= {id(node): function for node in ast.walk(function)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                self._assigned.setdefault((self._function_of[id(node)], node.targets[0].id), []).append(node)

    def resolve(self, node: ast.expr) -> str:
        """The text of an expression; PLACEHOLDER for parts that cannot be evaluated."""
        match node:
            case ast.Constant(value=str(text)):
                return text
            case ast.JoinedStr(values=parts):
                return "".join(self.resolve(part) for part in parts)
            case ast.FormattedValue(value=value):
                return self.resolve(value)
            case ast.IfExp(body=body):
                return self.resolve(body)
            case ast.Name(id=name):
                assigned = self._assigned.get((self._function_of[id(node)], name), [])
                above = [assign for assign in assigned if assign.lineno < node.lineno]
                return self.resolve(max(above, key=lambda assign: assign.lineno).value) if above else PLACEHOLDER
            case _:
                return PLACEHOLDER
