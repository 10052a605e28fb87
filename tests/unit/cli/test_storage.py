"""`tunesmith du` and `tunesmith prune`, and what `tunesmith delete` removes from this machine."""

from pathlib import Path

from cli.settings import Settings
from cli.storage import remove_local_copies


def test_local_copies_of_a_job_are_removed_and_no_others(tmp_path: Path) -> None:
    for name in ("job-1", "job-2"):
        (tmp_path / "downloads" / name / "gguf").mkdir(parents=True)
        (tmp_path / "downloads" / name / "gguf/model.gguf").write_bytes(b"x" * 10)

    assert remove_local_copies(Settings(home=tmp_path), "job-1") == 10

    assert [path.name for path in (tmp_path / "downloads").iterdir()] == ["job-2"]
    assert remove_local_copies(Settings(home=tmp_path), "job-1") == 0


def test_a_name_that_leaves_the_downloads_removes_nothing(tmp_path: Path) -> None:
    (tmp_path / "downloads").mkdir()
    (tmp_path / "objects").mkdir()

    for name in ("..", ".", "../objects", ""):
        assert remove_local_copies(Settings(home=tmp_path), name) == 0

    assert (tmp_path / "objects").is_dir()
    assert (tmp_path / "downloads").is_dir()
