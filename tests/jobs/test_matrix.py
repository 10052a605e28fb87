"""Every trainer type, method and modality on tiny models: trains, resumes exactly, exports faithfully. See `matrix.py`."""

from pathlib import Path
from typing import Any

import pytest

from tests.jobs.matrix import FIRST_MARK, LAST_MARK, Cell, build_bases, cells, render_table, run_cell

DOCS = Path(__file__).parent.parent.parent / "docs"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_bases(tmp_path_factory.mktemp("bases"))


def list_cases() -> list[Any]:
    """Every combination; those that export like another one do so only in the nightly run, as exporting takes half of the time.

    What is exported depends on method and modality, and each of them is exported with `sft`; each trainer type is exported with LoRA.
    """
    cases: list[Any] = []
    for cell in cells():
        has_own_export = cell.trainer_type == "sft" or cell.method == "LoRA"
        cases.append(pytest.param(cell, has_own_export, id=str(cell)))
        if not has_own_export:
            cases.append(pytest.param(cell, True, id=f"{cell}-exported", marks=pytest.mark.nightly))
    return cases


@pytest.mark.parametrize(("cell", "export"), list_cases())
def test_every_combination_trains_resumes_and_exports_faithfully(cell: Cell, export: bool, bases: Path, tmp_path: Path) -> None:
    outcome = run_cell(cell, bases, tmp_path, quantizations=["f16"], export=export)  # f16 alone must answer like the model
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
        assert fidelity.argmax_agreement >= 0.99
        assert fidelity.mean_kl_to_merged < 0.002


def test_documented_table_has_every_combination() -> None:
    page = (DOCS / "training.md").read_text()
    shown = page.partition(FIRST_MARK)[2].partition(LAST_MARK)[0]
    rows = [line for line in shown.splitlines() if line.startswith("| `")]
    assert [tuple(part.strip(" `") for part in row.split("|")[1:4]) for row in rows] == [
        (c.trainer_type, c.method, c.modality) for c in cells()
    ]
    assert all(row.split("|")[4].strip() == row.split("|")[5].strip() == "yes" for row in rows)
    assert render_table({}).splitlines()[0] in page
