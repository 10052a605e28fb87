"""Turns a trained model into what the job hands back: adapter, merged model, GGUF files; verified, then published.

Here belongs one file per kind of artifact, and what they share: the bench. Here belongs nothing that trains, and nothing
that knows a store (`jobs/publish.py`) or llama.cpp's interface (`jobs/llama/`).

    bench.py    what the exporters of one attempt share: the whole model, made once, and how it speaks
    folders.py  which files of a model folder are worth handing back, and what must be mended in them
    merge.py    adapter + base -> a whole model, checked against the two
    speech.py   the passages on which models are compared, and a model's log probabilities on them
    adapter.py, merged.py, gguf.py  the exporters
"""

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

from schema.job import ArtifactKind
from schema.training import TrainingConfig

if TYPE_CHECKING:
    from jobs.context import JobContext
    from jobs.exporters.bench import Bench
    from jobs.publish import Product
    from jobs.trained import TrainedModel
    from schema.job import Artifact

    Exporter = Callable[[Bench], tuple[Product, ...]]

# One line adds an exporter: kind -> "module:function", called with a Bench, answering finished and verified products.
EXPORTERS: dict[ArtifactKind, str] = {
    "adapter": "jobs.exporters.adapter:export",
    "merged": "jobs.exporters.merged:export",
    "gguf": "jobs.exporters.gguf:export",
}


def export_all(trained: "TrainedModel", context: "JobContext") -> "tuple[Artifact, ...]":
    """Make, verify and upload everything that the job asked for. Raises JobFailed `export_failed`, `upload_failed`.

    Nothing is uploaded before everything is verified, and nothing is visible before the service has taken the result.
    """
    from jobs.exporters.bench import Bench
    from jobs.publish import Publisher

    publisher = Publisher(context.stores.models, context.spec.job_id, context.attempt)
    bench = Bench(trained, context)
    try:
        products = [product for kind in kinds(context.spec.training_config) for product in _exporter(kind)(bench)]
        context.phase("uploading")
        publisher.clear_earlier()
        artifacts: list[Artifact] = []
        for product in products:
            context.check()
            artifacts.append(publisher.publish(product))
            context.artifact_made(artifacts[-1])
        context.check()
        return tuple(artifacts)
    finally:
        bench.clear()


def kinds(training_config: TrainingConfig) -> tuple[ArtifactKind, ...]:
    """What a training config asks for."""
    wants_gguf = bool(training_config.export_config.gguf_quantizations)
    return (training_config.export_format, "gguf") if wants_gguf else (training_config.export_format,)


def _exporter(kind: ArtifactKind) -> "Exporter":
    module, _, function = EXPORTERS[kind].partition(":")
    return getattr(import_module(module), function)
