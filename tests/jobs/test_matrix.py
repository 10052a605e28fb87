"""Every trainer type, method and modality on tiny models: trains, resumes exactly, exports faithfully. See `matrix.py`."""

from pathlib import Path
from typing import Any

import pytest

from tests.jobs.architectures import render_architectures
from tests.jobs.matrix import ARCHITECTURE_MARKS, FIRST_MARK, LAST_MARK, Cell, all_cells, build_tiny_bases, render_table, run_cell
from tests.tiny_models import ARCHITECTURES

DOCS = Path(__file__).parent.parent.parent / "docs"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_bases(tmp_path_factory.mktemp("bases"))


def list_cases() -> list[Any]:
    """Every combination. Exporting takes half of the time, so combinations that export like another one export only in the nightly run.

    The exported files depend on method and modality, so `sft` exports with each of them; the other trainer types export with LoRA.
    """
    cases: list[Any] = []
    for cell in all_cells():
        has_own_export = cell.trainer_type == "sft" or cell.method == "LoRA"
        cases.append(pytest.param(cell, has_own_export, id=str(cell)))
        if not has_own_export:
            cases.append(pytest.param(cell, True, id=f"{cell}-exported", marks=pytest.mark.nightly))
    return cases


@pytest.mark.parametrize(("cell", "export"), list_cases())
def test_every_combination_trains_resumes_and_exports_faithfully(cell: Cell, export: bool, bases: Path, tmp_path: Path) -> None:
    outcome = run_cell(cell, bases, tmp_path, quantizations=["f16"], export=export)  # only f16 must give the same answers as the model
    assert outcome.gradient_norm > 0
    assert outcome.weights_changed
    assert outcome.resumes_exactly
    assert outcome.metrics_match
    if not export:
        return
    expected = {"merged"} | ({"adapter"} if cell.method != "Full" else set()) | ({"gguf-f16"} if cell.trainer_type != "reward" else set())
    assert expected <= outcome.artifacts.keys()
    if cell.trainer_type != "reward":
        fidelity = outcome.artifacts["gguf-f16"].fidelity
        assert fidelity is not None
        assert fidelity["argmax_agreement"] >= 0.99
        assert fidelity["mean_kl_to_merged"] < 0.002


def test_documented_table_has_every_combination() -> None:
    page = (DOCS / "training.md").read_text()
    table = page.partition(FIRST_MARK)[2].partition(LAST_MARK)[0]
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    assert [tuple(part.strip(" `") for part in row.split("|")[1:4]) for row in rows] == [
        (cell.trainer_type, cell.method, cell.modality) for cell in all_cells()
    ]
    assert all(row.split("|")[4].strip() == row.split("|")[5].strip() == "yes" for row in rows)
    assert render_table({}).splitlines()[0] in page


def test_documented_table_has_every_architecture() -> None:
    page = (DOCS / "training.md").read_text()
    table = page.partition(ARCHITECTURE_MARKS[0])[2].partition(ARCHITECTURE_MARKS[1])[0]
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()]
    assert header == [cell.strip() for cell in render_architectures({}).splitlines()[0].strip("|").split("|")]
    assert [row[0] for row in rows] == [architecture.title for architecture in ARCHITECTURES.values()]
    assert all(row[3:5] == ["yes", "yes"] and row[5].startswith("100%") and row[6].startswith("100%") for row in rows)
    assert all((float(row[7].removesuffix(" σ")) > 1e-3) == (row[8] == "refused") for row in rows)
