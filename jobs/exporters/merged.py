"""The whole model as a Hugging Face folder: safetensors, tokenizer, chat template, generation settings."""

from typing import TYPE_CHECKING

from jobs.publish import Product
from schema.job import Fidelity

if TYPE_CHECKING:
    from jobs.exporters.bench import Bench


def export(bench: "Bench") -> tuple[Product, ...]:
    """The folder of the whole model; with how near it is to base and adapter, when it was merged from these."""
    whole = bench.whole
    found = whole.comparison
    fidelity = found and Fidelity(
        compared_tokens=found.positions,
        argmax_agreement=found.argmax_agreement,
        mean_kl_to_merged=found.mean_kl_to_trained,
        mean_kl_to_base=found.mean_kl_to_base,
    )
    return (Product(name="merged", kind="merged", path=whole.folder, key=bench.key("merged"), fidelity=fidelity),)
