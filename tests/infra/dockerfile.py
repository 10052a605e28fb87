"""Parsers of Dockerfiles and .dockerignore, so that both can be checked without a container engine."""

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import translate
from functools import cached_property
from pathlib import Path


@dataclass(frozen=True)
class Instruction:
    """One instruction with its continuation lines joined."""

    keyword: str
    text: str

    @property
    def exec_form(self) -> list[str] | None:
        """The words of the exec form; None for the shell form."""
        text = self.text[self.text.find("[") :] if self.keyword == "HEALTHCHECK" else self.text
        return json.loads(text) if text.startswith("[") else None

    @property
    def words(self) -> list[str]:
        """The words without options."""
        return [word for word in shlex.split(self.text) if not word.startswith("--")]


@dataclass(frozen=True)
class Stage:
    """One FROM with its instructions."""

    base: str
    name: str | None
    instructions: tuple[Instruction, ...]

    def instructions_with(self, keyword: str) -> list[Instruction]:
        """The instructions with that keyword, in order."""
        return [instruction for instruction in self.instructions if instruction.keyword == keyword]

    def last_instruction(self, keyword: str) -> Instruction:
        """The last instruction with that keyword, which takes effect."""
        return self.instructions_with(keyword)[-1]

    @property
    def environment(self) -> dict[str, str]:
        """The variables that its ENV instructions set."""
        return dict(word.split("=", 1) for instruction in self.instructions_with("ENV") for word in instruction.words)


@dataclass(frozen=True)
class Dockerfile:
    """All stages; the last one is the image."""

    arguments: dict[str, str]
    stages: tuple[Stage, ...]

    @cached_property
    def final_stage(self) -> Stage:
        """The stage that becomes the image."""
        return self.stages[-1]

    def stage(self, name: str) -> Stage:
        """The stage of that name."""
        return next(stage for stage in self.stages if stage.name == name)


def parse_dockerfile(text: str) -> Dockerfile:
    """Parse a Dockerfile; arguments in FROM have their default values."""
    arguments: dict[str, str] = {}
    stages: list[Stage] = []
    for instruction in _instructions(text):
        if instruction.keyword == "FROM":
            base, *stage_name = instruction.words
            base = re.sub(r"\$\{(\w+)\}", lambda match: arguments[match[1]], base)
            stages.append(Stage(base, stage_name[1] if stage_name else None, ()))
        elif not stages:
            name, _, default = instruction.text.partition("=")
            arguments[name] = default
        else:
            last = stages.pop()
            stages.append(Stage(last.base, last.name, (*last.instructions, instruction)))
    return Dockerfile(arguments, tuple(stages))


def _instructions(text: str) -> Iterator[Instruction]:
    lines = (line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    for line in joined.splitlines():
        keyword, _, rest = line.strip().partition(" ")
        yield Instruction(keyword.upper(), rest.strip())


@dataclass(frozen=True)
class DockerIgnore:
    """The paths that .dockerignore excludes: the last pattern that matches a path or one of its folders decides."""

    patterns: tuple[tuple[re.Pattern[str], bool], ...]

    def __contains__(self, path: str) -> bool:
        parts = path.split("/")
        prefixes = ["/".join(parts[: count + 1]) for count in range(len(parts))]
        is_excluded = False
        for pattern, excludes in self.patterns:
            if any(pattern.fullmatch(prefix) for prefix in prefixes):
                is_excluded = excludes
        return is_excluded


def parse_dockerignore(text: str) -> DockerIgnore:
    """Parse a .dockerignore."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return DockerIgnore(tuple((_glob_to_regex(line.removeprefix("!")), not line.startswith("!")) for line in lines))


def _glob_to_regex(glob: str) -> re.Pattern[str]:
    """`*` matches within a folder, `**/` matches any number of folders."""
    one_folder = translate(glob.replace("**/", "\0")).replace(".*", "[^/]*")
    return re.compile(one_folder.replace("\0", "(?:.*/)?").replace("\\\0", "(?:.*/)?"))


def read_dockerfile(path: Path) -> Dockerfile:
    """Parse the Dockerfile at that path."""
    return parse_dockerfile(path.read_text())
