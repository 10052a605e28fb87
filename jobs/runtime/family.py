"""The interface between the runtime and a family of trainers, which is a folder `jobs/<family>/`.

A training config names the functions of its family as "module:function" (`BaseTrainingConfig` in `schema/training/base.py`). The
runtime finds them with `pkgutil.resolve_name`, so it never imports a family.

    check_export(training_config) -> None                  raises JobFailed for an export that this environment cannot make
    train(training_config, context) -> TrainedModel        continues from the job's newest checkpoint; raises JobFailed, Stopped
    export(trained, context, finalize) -> artifacts        makes, verifies and uploads the artifacts, then calls `finalize`
    probe() -> FamilyCapabilities                          what this environment's packages can do; run when it is installed
    predict                                                optional: runs an exported model
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from jobs.runtime.artifacts import ExportedArtifact
from schema.job import Artifact, EvalMetrics
from schema.provenance import RunRecord


class TrainedModel(Protocol):
    """What `train` returns, as far as the runtime reads it. A family's own class has more fields, for its exporters.

    `metrics` are of the trained model and `base_metrics` of the base model, on the same held-out rows; None if there are none.
    """

    @property
    def folder(self) -> Path:
        """The folder of the trained model's files."""
        ...

    @property
    def base_folder(self) -> Path | None:
        """The folder of the base model's files; None if the training started from nothing."""
        ...

    @property
    def metrics(self) -> EvalMetrics | None: ...

    @property
    def base_metrics(self) -> EvalMetrics | None: ...

    @property
    def train_rows(self) -> int | None: ...

    @property
    def train_tokens(self) -> int | None: ...

    @property
    def train_runtime_s(self) -> float: ...

    @property
    def step(self) -> int | None:
        """The step at which the model had these weights; None in a family without steps."""
        ...

    @property
    def cuda(self) -> str | None:
        """The CUDA version that the family's framework was built for, for `run.json`; None without one."""
        ...


# Renders the model card, the README.md of the repository with that id on the Hub.
RenderModelCard = Callable[[RunRecord, str], str]
# Records the provenance of uploaded artifacts and, if the job asks for it, pushes the files to the Hub; returns the final artifacts.
FinalizeArtifacts = Callable[[Sequence[ExportedArtifact], Sequence[Artifact], RenderModelCard], tuple[Artifact, ...]]
