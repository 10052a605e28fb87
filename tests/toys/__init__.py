"""A toy of everything that can be added: launcher, environment, family, trainer types, exporter, tracker, store, format, shape.

`files/` has the new files, in the folders where they belong; REGISTRY_LINES are the lines that CONTRIBUTING.md asks for. Nothing else of
the project changes. They need the standard library and what the runtime needs.
"""

import shutil
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2]
FILES = Path(__file__).parent / "files"
PACKAGES = ("schema", "storage", "service", "jobs")
# file → (a line that is there, the line that takes its place)
REGISTRY_LINES: dict[str, list[tuple[str, str]]] = {
    "schema/training/__init__.py": [
        (
            "from schema.training.llm import",
            "from schema.training.toy import CounterConfig, DoublerConfig\nfrom schema.training.llm import",
        ),
        ("| GrpoConfig | RewardConfig\n", "| GrpoConfig | RewardConfig | CounterConfig | DoublerConfig\n"),
    ],
    "service/core/validation/__init__.py": [
        (
            '{"llm": "service.core.validation.llm:check_job"',
            '{"toy": "service.core.validation.toy:check_job", "llm": "service.core.validation.llm:check_job"',
        ),
    ],
    "service/core/validation/placement.py": [
        (
            '{"llm": "service.core.validation.llm_support:check_support"',
            '{"toy": "service.core.validation.toy:check_support", "llm": "service.core.validation.llm_support:check_support"',
        ),
    ],
    "service/adapters/launchers/__init__.py": [
        ("LAUNCHERS = {\n", 'LAUNCHERS = {\n    "toy": "service.adapters.launchers.toy:ToyLauncher",\n'),
    ],
    "storage/registry.py": [("STORES = {\n", 'STORES = {\n    "toy": "storage.toy:ToyStore",\n')],
    "jobs/ingest/formats/__init__.py": [("FORMATS: Final = {\n", 'FORMATS: Final = {\n    "toy": "jobs.ingest.formats.toy:open_toys",\n')],
    "jobs/ingest/mapping/__init__.py": [("SHAPES = {\n", 'SHAPES = {\n    "toy": "jobs.ingest.mapping.toy:recognize",\n')],
    "jobs/runtime/trackers/__init__.py": [("TRACKERS = {\n", 'TRACKERS = {\n    "toy": "jobs.runtime.trackers.toy_tracker:ToyTracker",\n')],
}


def copy_tree_with_toys(folder: Path) -> None:
    """Copy the packages into an empty folder and add the toys. Raises AssertionError when a registry is not where it should be."""
    ignore = shutil.ignore_patterns("__pycache__", "capabilities.json")
    for package in PACKAGES:
        shutil.copytree(SOURCE / package, folder / package, ignore=ignore)
    shutil.copytree(FILES, folder, dirs_exist_ok=True, ignore=ignore)
    for name, replacements in REGISTRY_LINES.items():
        text = (folder / name).read_text()
        for old, new in replacements:
            assert text.count(old) == 1, f"{name}: {old!r}"
            text = text.replace(old, new)
        (folder / name).write_text(text)


def copy_one_family(source: Path, folder: Path, family: str) -> None:
    """Copy to an empty folder only what an attempt of the family needs."""
    ignore = shutil.ignore_patterns("__pycache__")
    for package in ("schema", "storage", "jobs/runtime", f"jobs/{family}"):
        shutil.copytree(source / package, folder / package, ignore=ignore)
    for file in ("jobs/__init__.py", "jobs/run.py"):
        shutil.copy(source / file, folder / file)
