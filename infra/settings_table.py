"""Prints docs/settings.md from the settings themselves: `python infra/settings_table.py > docs/settings.md`."""

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
        default = "" if field.default in (None, PydanticUndefined) else f"`{field.default}`".replace(f"{SOURCE}/", "")
        variable = "`TUNESMITH_PORT` or `PORT`" if name == "port" else f"`TUNESMITH_{name.upper()}`"
        rows.append(f"| {variable} | {default} | {field.description} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(table(), end="")
