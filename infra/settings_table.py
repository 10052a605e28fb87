"""Prints docs/settings.md from the settings themselves: `python infra/settings_table.py > docs/settings.md`."""

from pydantic import AliasChoices
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from service.settings import SOURCE, Settings

HEAD = """# Settings

Generated from `service/settings.py` by `infra/settings_table.py`; a test keeps it so. Each is an environment variable of the service.

| variable | default | meaning |
|---|---|---|"""


def table() -> str:
    """The page, as text."""
    rows = [HEAD]
    for name, field in Settings.model_fields.items():
        default = "" if field.default in (None, PydanticUndefined) else f"`{_shown(field.default)}`"
        rows.append(f"| {_variables(name, field)} | {default} | {field.description} |")
    return "\n".join(rows) + "\n"


def _shown(default: object) -> str:
    return ",".join(default) if isinstance(default, tuple) else str(default).replace(f"{SOURCE}/", "")


def _variables(name: str, field: FieldInfo) -> str:
    match field.validation_alias:
        case AliasChoices(choices=choices):
            return " or ".join(f"`{choice}`" for choice in choices)
        case str(alias):
            return f"`{alias}`"
        case _:
            return f"`TUNESMITH_{name.upper()}`"


if __name__ == "__main__":
    print(table(), end="")
