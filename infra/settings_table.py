"""Prints docs/settings.md from the settings themselves: `python infra/settings_table.py > docs/settings.md`."""

from pydantic import AliasChoices
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from service.settings import SOURCE_ROOT, Settings

PAGE_HEADER = """# Settings

Generated from `service/settings.py` by `infra/settings_table.py`; a test keeps it so. Each is an environment variable of the service.

| variable | default | meaning |
|---|---|---|"""


def render_settings_page() -> str:
    """The page, as text."""
    rows = [PAGE_HEADER]
    for name, field in Settings.model_fields.items():
        default = "" if field.default in (None, PydanticUndefined) else f"`{_format_default(field.default)}`"
        rows.append(f"| {_format_variable_names(name, field)} | {default} | {field.description} |")
    return "\n".join(rows) + "\n"


def _format_default(default: object) -> str:
    return ",".join(default) if isinstance(default, tuple) else str(default).replace(f"{SOURCE_ROOT}/", "")


def _format_variable_names(name: str, field: FieldInfo) -> str:
    match field.validation_alias:
        case AliasChoices(choices=choices):
            return " or ".join(f"`{choice}`" for choice in choices)
        case str(alias):
            return f"`{alias}`"
        case _:
            return f"`TUNESMITH_{name.upper()}`"


if __name__ == "__main__":
    print(render_settings_page(), end="")
