"""A Dockerfile as a value, and what .dockerignore lets into its context: enough to check both without a container engine."""

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
    """One instruction, its continuation lines joined."""

    keyword: str
    text: str

    @property
    def exec_form(self) -> list[str] | None:
        """The words of a JSON list, which no shell sees; None for the shell form."""
        text = self.text[self.text.find("[") :] if self.keyword == "HEALTHCHECK" else self.text
        return json.loads(text) if text.startswith("[") else None

    @property
    def words(self) -> list[str]:
        """The words without options."""
        return [word for word in shlex.split(self.text) if not word.startswith("--")]

    @property
    def from_stage(self) -> str | None:
        """The stage that a COPY takes from; None: the context."""
        found = re.search(r"--from=(\S+)", self.text)
        return found[1] if found else None


@dataclass(frozen=True)
class Stage:
    """What follows one FROM, with its base."""

    base: str
    name: str | None
    instructions: tuple[Instruction, ...]

    def instructions_with(self, keyword: str) -> list[Instruction]:
        """Its instructions of that keyword, in order."""
        return [instruction for instruction in self.instructions if instruction.keyword == keyword]

    def last_instruction(self, keyword: str) -> Instruction:
        """The one that counts."""
        return self.instructions_with(keyword)[-1]

    @property
    def environment(self) -> dict[str, str]:
        """What its ENV instructions set."""
        return dict(word.split("=", 1) for instruction in self.instructions_with("ENV") for word in instruction.words)


@dataclass(frozen=True)
class Dockerfile:
    """All its stages; the last is the image."""

    arguments: dict[str, str]
    stages: tuple[Stage, ...]

    @cached_property
    def final_stage(self) -> Stage:
        """The stage that is shipped."""
        return self.stages[-1]

    def stage(self, name: str) -> Stage:
        """The stage of that name."""
        return next(stage for stage in self.stages if stage.name == name)


def parse_dockerfile(text: str) -> Dockerfile:
    """The Dockerfile; FROM's arguments have their defaults."""
    arguments: dict[str, str] = {}
    stages: list[Stage] = []
    for instruction in _instructions(text):
        if instruction.keyword == "FROM":
            base, *named = instruction.words
            base = re.sub(r"\$\{(\w+)\}", lambda found: arguments[found[1]], base)
            stages.append(Stage(base, named[1] if named else None, ()))
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
    """What .dockerignore keeps out: the last pattern that fits a path, or one of its folders, decides."""

    patterns: tuple[tuple[re.Pattern[str], bool], ...]

    def __contains__(self, path: str) -> bool:
        steps = path.split("/")
        ways = ["/".join(steps[: count + 1]) for count in range(len(steps))]
        kept_out = False
        for pattern, keeps_out in self.patterns:
            if any(pattern.fullmatch(way) for way in ways):
                kept_out = keeps_out
        return kept_out


def parse_dockerignore(text: str) -> DockerIgnore:
    """The rules of a .dockerignore."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return DockerIgnore(tuple((_glob_to_regex(line.removeprefix("!")), not line.startswith("!")) for line in lines))


def _glob_to_regex(glob: str) -> re.Pattern[str]:
    """`*` stays inside a folder, `**/` is any number of folders."""
    one_folder = translate(glob.replace("**/", "\0")).replace(".*", "[^/]*")
    return re.compile(one_folder.replace("\0", "(?:.*/)?").replace("\\\0", "(?:.*/)?"))


def read_dockerfile(path: Path) -> Dockerfile:
    """The Dockerfile at that path."""
    return parse_dockerfile(path.read_text())
