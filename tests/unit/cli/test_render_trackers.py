"""How the commands show where a tracker keeps a job's metrics."""

import pytest

from cli.render.trackers import describe_tracker


@pytest.mark.parametrize(
    ("tracker", "url", "shown"),
    [
        ("wandb", "https://wandb.ai/a/p/runs/1", "wandb: https://wandb.ai/a/p/runs/1"),
        (
            "wandb",
            "file:///h/trackers/1/wandb",
            "wandb: file:///h/trackers/1/wandb (wandb sync /h/trackers/1/wandb/attempt-*/offline-run-*)",
        ),
        ("wandb", "gs://bucket/trackers/1/wandb", "wandb: gs://bucket/trackers/1/wandb"),
        ("tensorboard", "file:///my%20h/tb", "tensorboard: file:///my%20h/tb (tensorboard --logdir '/my h/tb')"),
        ("wandb", None, "wandb: no page of the run"),
    ],
)
def test_files_of_a_tracker_are_shown_with_their_command(tracker: str, url: str | None, shown: str) -> None:
    assert describe_tracker(tracker, url) == shown
