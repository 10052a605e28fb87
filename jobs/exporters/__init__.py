"""Turns a trained model into what the job hands back: adapter, merged model, GGUF files; verified, then published.

Here belongs one file per kind of artifact, and what they share: the bench. Here belongs nothing that trains, and nothing
that knows a store (`jobs/publish.py`) or llama.cpp's interface (`jobs/llama/`).

    bench.py      what the exporters of one attempt share: the whole model, made once, and how it speaks
    folders.py    which files of a model folder are worth handing back, and what must be mended in them
    merge.py      adapter + base -> a whole model, checked against the two
    streaming.py  the sum itself, tensor by tensor
    speech.py     the passages on which models are compared, and a model's log probabilities on them
    examiner.py   hears a GGUF file out, and decides whether it may go out
    howto.py      how to run a GGUF file: Ollama's Modelfile, llama.cpp's command line
    adapter.py, merged.py, onnx.py, gguf.py, lora_gguf.py  the exporters
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.errors import JobFailed
from jobs.llama import SHARE, program
from schema.job import ArtifactKind
from schema.training import TrainingConfig

if TYPE_CHECKING:
    from jobs.context import JobContext
    from jobs.exporters.bench import Bench
    from jobs.publish import Product
    from jobs.trained import TrainedModel
    from schema.job import Artifact

    Exporter = Callable[[Bench], tuple[Product, ...]]
    Seal = Callable[[Sequence[Product], Sequence[Artifact]], tuple[Artifact, ...]]

# One line adds an exporter: kind -> "module:function", called with a Bench, answering finished and verified products.
EXPORTERS: dict[ArtifactKind, str] = {
    "adapter": "jobs.exporters.adapter:export",
    "merged": "jobs.exporters.merged:export",
    "onnx": "jobs.exporters.onnx:export",
    "gguf": "jobs.exporters.gguf:export",
    "lora_gguf": "jobs.exporters.lora_gguf:export",
}


def export_all(trained: "TrainedModel", context: "JobContext", seal: "Seal | None" = None) -> "tuple[Artifact, ...]":
    """Make, verify and upload everything that the job asked for. Raises JobFailed `export_failed`, `upload_failed`.

    Nothing is uploaded before everything is verified, and nothing is visible before the service has taken the result. `seal` is given
    the products while their files are still here, and what they became.
    """
    from jobs.exporters.bench import Bench
    from jobs.publish import Publisher

    refuse_impossible(context.spec.training_config)
    publisher = Publisher(context.stores.models, context.spec.job_id, context.attempt)
    bench = Bench(trained, context)
    try:
        products = [product for kind in kinds(context.spec.training_config) for product in _exporter(kind)(bench)]
        products += bench.companions()
        context.phase("uploading")
        publisher.clear_earlier()
        artifacts: list[Artifact] = []
        for product in products:
            context.check()
            artifacts.append(publisher.publish(product))
            context.artifact_made(artifacts[-1])
        context.check()
        return seal(products, artifacts) if seal else tuple(artifacts)
    finally:
        bench.clear()


def kinds(training_config: TrainingConfig) -> tuple[ArtifactKind, ...]:
    """What a training config asks for."""
    export = training_config.export_config
    wanted: list[ArtifactKind] = list(training_config.export_formats)
    if export.include_gguf:
        wanted.append("gguf")
    if export.include_lora_gguf:
        wanted.append("lora_gguf")
    return tuple(wanted)


def refuse_impossible(training_config: TrainingConfig, base: Path | None = None, programs: Path = SHARE) -> None:
    """Raises JobFailed for an export that cannot be made here, whatever is trained: to be asked before the training.

    `base` is the base's folder, once there is one: some exports are for small models. `programs` is where llama.cpp's are.
    """
    if base is not None and "onnx" in training_config.export_formats:
        from jobs.exporters.onnx import refuse_large

        refuse_large(base)
    export = training_config.export_config
    if export.gguf_imatrix and program("llama-imatrix", programs) is None:
        hint = "leave gguf_imatrix out, or run infra/llama_cpp.sh with the trainer's python"
        raise JobFailed("invalid_config", "gguf_imatrix needs llama.cpp's llama-imatrix, which is not installed here", hint)


def _exporter(kind: ArtifactKind) -> "Exporter":
    module, _, function = EXPORTERS[kind].partition(":")
    return getattr(import_module(module), function)
