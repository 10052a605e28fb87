"""Repository checks: light imports, resolvable registries, pages that match the code."""

import ast
import re
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path
from pkgutil import resolve_name
from typing import get_args

import pytest

from infra.settings_table import render_settings_page
from schema.training import TRAINER_TYPES, SftConfig
from schema.training.llm_evaluation import EvalConfig
from schema.training.llm_export import ExportConfig
from schema.training.llm_graders import GRADER_TYPES
from schema.training.llm_hyperparameters import Hyperparameters
from schema.types import TextDatasetType
from service.adapters.jobstores import JOB_STORES
from service.adapters.launchers import LAUNCHERS
from service.adapters.links import URL_SIGNERS
from service.adapters.secrets import SECRET_STORES
from storage.registry import STORES

SOURCE = Path(__file__).resolve().parents[2]
HEAVY_PACKAGES = {
    "torch",
    "transformers",
    "trl",
    "peft",
    "datasets",
    "numpy",
    "pandas",
    "wandb",
    "llama_cpp",
    "huggingface_hub",
    "google",
    "boto3",
}


def imported_packages(module: str) -> set[str]:
    """The packages that a fresh interpreter has loaded after it imported the module."""
    code = f"import sys, {module}; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=SOURCE)
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_service_imports_neither_ml_nor_cli() -> None:
    assert not (HEAVY_PACKAGES | {"cli", "jobs"}) & imported_packages("service.main")


def test_cli_imports_neither_ml_nor_service() -> None:
    assert not (HEAVY_PACKAGES | {"service", "jobs", "storage", "fastapi", "uvicorn"}) & imported_packages("cli.main")


def imported_names(path: Path) -> set[str]:
    """Every module or name that a file imports, also inside functions and under TYPE_CHECKING."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_modules_have_no_import_cycles() -> None:
    paths = [path for package in ("jobs", "service", "schema", "storage", "cli") for path in (SOURCE / package).rglob("*.py")]
    modules = {".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}
    TopologicalSorter({module: imported_names(path) & modules.keys() - {module} for module, path in modules.items()}).prepare()


FAMILY_NEUTRAL = ("jobs/run.py", "jobs/runtime", "schema", "service/core/jobs", "service/core/job_store_rules.py")
# The union, the files of the family, and what a record of the time with one family means.
FAMILY_FILES = ("schema/training/__init__.py", "schema/training/llm", "schema/estimate/llm", "schema/job_migrations.py")


def family_neutral_files() -> list[Path]:
    """The files that must read a family through its config class only."""
    paths = [path for name in FAMILY_NEUTRAL for path in ((SOURCE / name).rglob("*.py") if (SOURCE / name).is_dir() else [SOURCE / name])]
    return [path for path in paths if not path.relative_to(SOURCE).as_posix().startswith(FAMILY_FILES)]


def find_family_names() -> set[str]:
    """The public names that the files of a family define."""
    trees = [ast.parse(path.read_text()) for path in (SOURCE / "schema/training").glob("llm*.py")]
    return {node.name for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}


def find_mentioned_names(path: Path) -> set[str]:
    """Every name and attribute in a file's code."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    return {node.id for node in nodes if isinstance(node, ast.Name)} | {node.attr for node in nodes if isinstance(node, ast.Attribute)}


@pytest.mark.parametrize("path", family_neutral_files(), ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_shared_code_names_no_family(path: Path) -> None:
    imported = imported_names(path)
    assert [name for name in imported if re.search(r"(^|[._])llm", name)] == []
    assert (find_mentioned_names(path) | {name.rpartition(".")[2] for name in imported}) & find_family_names() == set()


def find_wall_violations(source: Path) -> list[str]:
    """Imports between families, from the runtime to a family, from `cli` beyond the schema, and of AGPL code outside `jobs/yolo`."""
    families = {path.name for path in (source / "jobs").iterdir() if (path / "__init__.py").exists()} - {"runtime"}
    violations: list[str] = []
    for path in sorted(source.rglob("*.py")):
        parts = path.relative_to(source).parts
        owner = parts[1] if parts[0] == "jobs" and len(parts) > 2 else parts[0]
        for name in imported_names(path):
            imported = name.split(".")
            family = imported[1] if imported[0] == "jobs" and len(imported) > 1 and imported[1] in families else None
            crosses_families = family is not None and parts[0] == "jobs" and owner != family
            beyond_schema = parts[0] == "cli" and imported[0] in ("service", "storage", "jobs")
            agpl = imported[0] == "ultralytics" and parts[:2] != ("jobs", "yolo")
            if crosses_families or beyond_schema or agpl:
                violations.append(f"{'/'.join(parts)}: {name}")
    return violations


def test_families_runtime_and_cli_keep_their_walls(tmp_path: Path) -> None:
    for package in ("schema", "storage", "service", "cli", "jobs"):
        shutil.copytree(SOURCE / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    assert find_wall_violations(tmp_path) == []


def test_broken_wall_is_detected(tmp_path: Path) -> None:
    for name, text in {
        "jobs/llm/__init__.py": "import jobs.yolo.trainer",
        "jobs/yolo/__init__.py": "import ultralytics",
        "jobs/runtime/__init__.py": "from jobs.llm import chat",
        "jobs/runtime/client.py": "def f():\n    import ultralytics",
        "cli/main.py": "import storage.file",
        "service/core/x.py": "import schema.job",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert {line.partition(":")[0] for line in find_wall_violations(tmp_path)} == {
        *("cli/main.py", "jobs/llm/__init__.py", "jobs/runtime/__init__.py", "jobs/runtime/client.py")
    }


@pytest.mark.parametrize("path", sorted((SOURCE / "jobs/runtime").rglob("*.py")), ids=lambda path: path.name)
def test_runtime_mentions_no_family_and_imports_no_ml_library_even_in_functions(path: Path) -> None:
    assert re.findall(r"\bllm\b|LoRA|\bsft\b", path.read_text()) == []
    ml_packages = {"torch", "transformers", "trl", "peft", "datasets", "numpy", "llama_cpp", "sklearn", "ultralytics"}
    assert {name.partition(".")[0] for name in imported_names(path)} & ml_packages == set()


def test_llm_enters_declared_phases_only() -> None:
    source = "".join(path.read_text() for path in [*(SOURCE / "jobs/llm").rglob("*.py"), SOURCE / "jobs/runtime/artifacts.py"])
    entered = set(re.findall(r'enter_phase\("(\w+)"\)', source))
    assert entered == set(SftConfig.phases)


def test_service_requirements_contain_no_ml_library() -> None:
    pinned = {line.partition("==")[0].lower() for line in (SOURCE / "requirements/service.txt").read_text().splitlines()}
    clients = {"boto3", "huggingface_hub"}  # not ML libraries; their adapters import them on first use
    assert not {name.replace("_", "-") for name in pinned} & {name.replace("_", "-") for name in HEAVY_PACKAGES - clients}


@pytest.mark.parametrize(
    "registry", [JOB_STORES, LAUNCHERS, URL_SIGNERS, SECRET_STORES, STORES], ids=["jobs", "launchers", "links", "secrets", "objects"]
)
def test_every_registry_line_resolves(registry: dict[str, str]) -> None:
    for line in registry.values():
        assert isinstance(resolve_name(line), type)


def test_every_trainer_type_names_existing_functions() -> None:
    for config in TRAINER_TYPES.values():
        for entry_point in (config.check_export, config.train, config.export):
            module, _, function = entry_point.partition(":")
            path = SOURCE / module.replace(".", "/")
            source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            assert f"def {function}(" in source.read_text()


def test_settings_page_is_up_to_date() -> None:
    assert (SOURCE / "docs/settings.md").read_text() == render_settings_page()


def test_documentation_links_resolve() -> None:
    pages = [*SOURCE.glob("*.md"), *(SOURCE / "docs").rglob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_files_named_in_architecture_exist() -> None:
    text = (SOURCE / "ARCHITECTURE.md").read_text()
    for name in re.findall(r"`((?:service|schema|jobs|storage|tests)/[\w/]+\.py)`", text):
        assert (SOURCE / name).exists(), name


def test_failure_table_names_existing_tests() -> None:
    page = (SOURCE / "docs/reliability.md").read_text().partition("## What happens when X fails")[2].partition("\n## ")[0]
    named = [line.rpartition("| `")[2].removesuffix("` |") for line in page.splitlines() if line.startswith("| ") and "`" in line]
    assert len(named) > 20
    tests = "".join(path.read_text() for path in (SOURCE / "tests").rglob("test_*.py"))
    missing = [name for name in named if not ((SOURCE / name).is_file() if "/" in name else f"def {name}(" in tests)]
    assert missing == []


def test_api_page_lists_defaults_per_trainer_type() -> None:
    page = (SOURCE / "docs/api.md").read_text()
    rows = {cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for line in page.splitlines() if len(cells := line.split("|")) == 9}
    defaults = {name: config.model_fields["hyperparameters"].default for name, config in TRAINER_TYPES.items()}
    assert rows[""] == [f"`{name}`" for name in defaults]
    rates = [config.learning_rates for config in TRAINER_TYPES.values()]
    assert [float(cell) for cell in rows["`learning_rate`, LoRA and QLoRA"]] == [rate["LoRA"] for rate in rates]
    assert [float(cell) for cell in rows["`learning_rate`, Full"]] == [rate["Full"] for rate in rates]
    assert all(rate["LoRA"] == rate["QLoRA"] for rate in rates)
    batches = [
        f"{hyperparameters.batch_size} × {hyperparameters.gradient_accumulation_steps or 'chosen'}" for hyperparameters in defaults.values()
    ]
    assert rows["`batch_size` × `gradient_accumulation_steps`"] == batches
    assert [int(cell) for cell in rows["`epochs`"]] == [hyperparameters.epochs for hyperparameters in defaults.values()]
    own = [
        [f"`{name}`" for name in type(hyperparameters).model_fields if name not in Hyperparameters.model_fields]
        for hyperparameters in defaults.values()
    ]
    assert [cell.split(", ") for cell in rows["its own"]] == own


def test_api_page_lists_trainer_types_graders_and_fields() -> None:
    page = (SOURCE / "docs/api.md").read_text()
    documented = set(re.findall(r"`(\w+)`", page))
    assert set(TRAINER_TYPES) | set(GRADER_TYPES) | set(get_args(TextDatasetType)) <= documented
    assert set(EvalConfig.model_fields) - {"batch_eval_metrics"} | set(ExportConfig.model_fields) <= documented
    for name, config in TRAINER_TYPES.items():
        [row] = [line for line in page.splitlines() if line.startswith((f"| `{name}` |", f"| `{name}` (left out) |"))]
        assert [cell.strip() for cell in row.split("|")][3:5] == [
            ", ".join(f"`{kind}`" for kind in config.dataset_types),
            ", ".join(config.modalities),
        ]
