"""The whole model as a Hugging Face folder: safetensors, tokenizer, chat template, generation settings."""

from typing import TYPE_CHECKING

from jobs.exporters.examiner import fidelity_of
from jobs.exporters.folders import FIDELITY, write_json
from jobs.publish import Product

if TYPE_CHECKING:
    from jobs.exporters.bench import Bench


def export(bench: "Bench") -> tuple[Product, ...]:
    """The folder of the whole model; with how near it is to base and adapter, when it was merged from these."""
    whole = bench.whole
    found = whole.speech and whole.speech.comparison
    fidelity = fidelity_of(found) if found else None
    if fidelity is not None:
        write_json(whole.folder / FIDELITY, {"merged": fidelity.model_dump(mode="json")})
    return (Product(name="merged", kind="merged", path=whole.folder, key=bench.key("merged"), fidelity=fidelity),)
