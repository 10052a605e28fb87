"""Prints docs/settings.md from the settings themselves: `python infra/settings_table.py > docs/settings.md`."""

from collections.abc import Iterator

from pydantic import AliasChoices
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from pydantic_settings import BaseSettings

from service.adapters.launchers.cloud_run.settings import CloudRunSettings
from service.adapters.launchers.local.settings import LocalSettings
from service.setting_types import SOURCE_ROOT
from service.settings import Settings

PAGE_HEADER = """# Settings

Generated from the settings themselves by `infra/settings_table.py`; a test keeps it so. Each is an environment variable of the service.
A deployment has one or more launchers (`TUNESMITH_LAUNCHERS`); each of them reads its own settings.
"""
TABLE_HEADER = """| variable | default | meaning |
|---|---|---|"""
SECTIONS: tuple[tuple[str, type[BaseSettings]], ...] = (
    ("The service", Settings),
    ("The launcher `local`", LocalSettings),
    ("The launcher `cloud-run`", CloudRunSettings),
)


def render_settings_page() -> str:
    """The page, as text."""
    sections = [f"## {title}\n\n{TABLE_HEADER}\n" + "\n".join(_render_rows(settings)) + "\n" for title, settings in SECTIONS]
    return "\n".join([PAGE_HEADER, *sections])


def _render_rows(settings: type[BaseSettings]) -> Iterator[str]:
    prefix = settings.model_config.get("env_prefix", "")
    for name, field in settings.model_fields.items():
        default = "" if field.default in (None, PydanticUndefined, ()) else f"`{_format_default(field.default)}`"
        yield f"| {_format_variable_names(prefix + name.upper(), field)} | {default} | {field.description} |"


def _format_default(default: object) -> str:
    return ",".join(default) if isinstance(default, tuple) else str(default).replace(f"{SOURCE_ROOT}/", "")


def _format_variable_names(name: str, field: FieldInfo) -> str:
    match field.validation_alias:
        case AliasChoices(choices=choices):
            return " or ".join(f"`{choice}`" for choice in choices)
        case str(alias):
            return f"`{alias}`"
        case _:
            return f"`{name}`"


if __name__ == "__main__":
    print(render_settings_page(), end="")
