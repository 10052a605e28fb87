"""infra/bare_clone_targets.py covers the whole Makefile, and finds a target that needs what a bare clone lacks."""

import subprocess
from pathlib import Path

import pytest

from infra.bare_clone_targets import COLLECT_TESTS, SMOKES, Smoke, find_untried_targets, try_target

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with one commit, and a built file that is not in it."""
    (tmp_path / "Makefile").write_text(
        "alone:\n\t@echo ready $(ARGS)\nneeds-build:\n\t@cat built\nrefuses:\n\t@echo PROJECT_ID is missing; exit 1\n"
    )
    author = ("-c", "user.name=t", "-c", "user.email=t@example.com")
    for arguments in (("init", "-q"), ("add", "Makefile"), (*author, "commit", "-qm", "Add a Makefile")):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    (tmp_path / "built").write_text("ready")
    return tmp_path


def test_every_make_target_is_tried() -> None:
    assert find_untried_targets(ROOT) == set()


def test_new_make_target_is_noticed(repository: Path) -> None:
    assert find_untried_targets(repository) == {"alone", "needs-build", "refuses"}


def test_target_that_works_alone_passes(repository: Path) -> None:
    assert try_target(repository, "alone", Smoke(("ARGS=now",), output_has="ready now")) is None


def test_target_that_needs_earlier_build_fails(repository: Path) -> None:
    problem = try_target(repository, "needs-build", Smoke())
    assert problem is not None
    assert "built: No such file" in problem


def test_missing_output_fails(repository: Path) -> None:
    problem = try_target(repository, "alone", Smoke(output_has="usage"))
    assert problem is not None
    assert problem.startswith("the output does not contain 'usage'")


def test_expected_refusal_passes_and_unexpected_success_fails(repository: Path) -> None:
    assert try_target(repository, "refuses", SMOKES["deploy"]) is None
    assert try_target(repository, "alone", SMOKES["deploy"]) is not None


def test_collecting_needs_tests(repository: Path) -> None:
    assert try_target(repository, "alone", COLLECT_TESTS) is not None
