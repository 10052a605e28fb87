"""Every trainer type, method and modality on tiny models: trains, resumes exactly, exports faithfully. See `matrix.py`."""

from pathlib import Path

import pytest

from tests.jobs.matrix import FIRST_MARK, LAST_MARK, Cell, build_bases, cells, render_table, run_cell

DOCS = Path(__file__).parent.parent.parent / "docs"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_bases(tmp_path_factory.mktemp("bases"))


@pytest.mark.parametrize("cell", cells(), ids=str)
def test_every_combination_trains_resumes_and_exports_faithfully(cell: Cell, bases: Path, tmp_path: Path) -> None:
    found = run_cell(cell, bases, tmp_path, quantizations=["f16"])  # the only quantization that must match the model
    assert found.gradient_norm > 0
    assert found.weights_changed
    assert found.resumes_exactly
    assert found.metrics_match
    wanted = {"merged"} | ({"adapter"} if cell.method != "Full" else set()) | ({"gguf-f16"} if cell.trainer_type != "reward" else set())
    assert wanted <= found.artifacts.keys()
    if cell.trainer_type != "reward":
        fidelity = found.artifacts["gguf-f16"].fidelity
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
