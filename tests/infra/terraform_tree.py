"""A parser of Terraform files: their items, and the references between them."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import hcl2

# The values of python-hcl2: strings keep their quotes, expressions are "${…}", a block is a mapping marked as one.
Value: TypeAlias = "str | int | float | bool | list[Value] | dict[str, Value] | None"
Body: TypeAlias = "dict[str, Value]"

PARSER_KEYS = ("__is_block__", "__comments__", "__inline_comments__")


@dataclass(frozen=True)
class TerraformItem:
    """A block with labels and a body: a resource, data source, variable, output and so on."""

    kind: str  # "resource", "data", "variable", …
    labels: tuple[str, ...]
    body: Body

    @property
    def address(self) -> str:
        """The address as Terraform prints it: google_storage_bucket.buckets, data.google_project.this, var.region."""
        prefix = {"resource": (), "variable": ("var",)}.get(self.kind, (self.kind,))
        return ".".join((*prefix, *self.labels))

    @property
    def type(self) -> str:
        """The type of a resource or data source."""
        return self.labels[0]


@dataclass(frozen=True)
class TerraformModule:
    """All items and locals of a folder of Terraform files."""

    items: tuple[TerraformItem, ...]
    locals: Mapping[str, Value]

    def items_of(self, kind: str, type_: str | None = None) -> list[TerraformItem]:
        """The items of a kind, optionally of one resource type."""
        return [item for item in self.items if item.kind == kind and (type_ is None or item.type == type_)]


def read_files(folder: Path) -> TerraformModule:
    """Parse every *.tf of the folder. Raises python-hcl2's error for invalid HCL."""
    return parse(path.read_text() for path in sorted(folder.glob("*.tf")))


def parse(texts: Iterable[str]) -> TerraformModule:
    """Parse the texts of some files as one module."""
    items: list[TerraformItem] = []
    local_values: dict[str, Value] = {}
    for text in texts:
        for kind, blocks in hcl2.loads(text).items():
            if kind in PARSER_KEYS:
                continue
            for block in blocks:
                if kind == "locals":
                    local_values |= strip_parser_keys(block)
                else:
                    items.extend(_items(kind, (), block))
    return TerraformModule(tuple(items), local_values)


def _items(kind: str, labels: tuple[str, ...], block: Body) -> Iterator[TerraformItem]:
    """The items in a block: its labels are nested keys down to the block's own body."""
    if block.get("__is_block__") is True:
        yield TerraformItem(kind, labels, strip_parser_keys(block))
        return
    for label, inner in strip_parser_keys(block).items():
        assert isinstance(inner, dict), f"{kind} {label} has no body"
        yield from _items(kind, (*labels, unquote(label)), inner)


def strip_parser_keys(block: Body) -> Body:
    """The block without the parser's marks."""
    return {name: value for name, value in block.items() if name not in PARSER_KEYS}


def is_block(value: Value) -> bool:
    """Whether the value is blocks, not an attribute."""
    return isinstance(value, list) and bool(value) and all(isinstance(part, dict) and "__is_block__" in part for part in value)


def unquote(value: Value) -> str:
    """A string or a bare expression without its quotes and braces."""
    text = str(value)
    for start, end in (('"', '"'), ("${", "}")):
        if text.startswith(start) and text.endswith(end) and len(text) > len(start):
            return text[len(start) : -len(end)]
    return text


def iter_strings(value: Value) -> Iterator[str]:
    """Every string and expression in a value, keys included."""
    match value:
        case dict():
            for name, inner in value.items():
                if name not in PARSER_KEYS:
                    yield name
                    yield from iter_strings(inner)
        case list():
            for inner in value:
                yield from iter_strings(inner)
        case _:
            yield str(value)


VARIABLE = re.compile(r"\bvar\.(\w+)")
LOCAL = re.compile(r"\blocal\.(\w+)")
RESOURCE = re.compile(r"(?<![\w.])((?:data\.)?google_\w+\.\w+)")


def references(value: Value) -> set[str]:
    """The addresses in a value: var.region, local.hardware, google_storage_bucket.buckets."""
    addresses: set[str] = set()
    for text in iter_strings(value):
        addresses |= {f"var.{name}" for name in VARIABLE.findall(text)}
        addresses |= {f"local.{name}" for name in LOCAL.findall(text)}
        addresses |= set(RESOURCE.findall(text))
    return addresses


def references_by_address(files: TerraformModule) -> dict[str, set[str]]:
    """The references of each address."""
    by_address = {item.address: references(item.body) for item in files.items}
    return by_address | {f"local.{name}": references(value) for name, value in files.locals.items()}


def find_undeclared(files: TerraformModule) -> list[str]:
    """References to addresses that are not declared."""
    used = references_by_address(files)
    return sorted(f"{address} refers to {name}" for address, names in used.items() for name in names - used.keys())


def find_unused(files: TerraformModule) -> list[str]:
    """Variables and locals without a reference."""
    used = set().union(*references_by_address(files).values())
    return sorted(name for name in references_by_address(files) if name.startswith(("var.", "local.")) and name not in used)


def find_cycle(files: TerraformModule) -> list[str]:
    """Addresses that depend on themselves directly or through others; Terraform refuses them."""
    remaining = {
        address: {name for name in names if name != address}
        for address, names in references_by_address(files).items()
        if not address.startswith("output.")
    }
    while ready := {address for address, names in remaining.items() if not names & remaining.keys()}:
        remaining = {address: names for address, names in remaining.items() if address not in ready}
    return sorted(remaining)
