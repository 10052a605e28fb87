"""The adapter alone as GGUF, for those who have the base's file already: small, and heard beside the base before it goes out.

llama.cpp adds an adapter to matrices of the layers. The embeddings of single tokens, which are trained when a base without turns
learns to chat, are in no such file: with the head tied to the embeddings llama.cpp cannot add to them. Then the file goes out with
a warning, and its fidelity says how far it is.
"""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.errors import JobFailed
from jobs.exporters.adapter import SETTINGS, WEIGHTS
from jobs.exporters.examiner import Candidate, Examiner
from jobs.exporters.folders import precision, write_json
from jobs.exporters.gguf import note_fidelity, stage, tell_how
from jobs.llama.apart import ProgramFailed, convert, convert_lora
from jobs.publish import Product

if TYPE_CHECKING:
    from jobs.exporters.bench import Bench

NAME = "lora-gguf"
USE_GGUF = "use include_gguf: a whole model holds everything that was trained"
OF_TOKENS = ".token_adapter.trainable_tokens_delta"
OF_LAYERS = (".lora_A.weight", ".lora_B.weight")


def export(bench: "Bench") -> tuple[Product, ...]:
    """One file, in float16. Raises JobFailed `export_failed`."""
    trained = bench.trained
    _ = bench.whole  # before the phase: making it is one of its own
    bench.context.phase("converting")
    base = bench.path(f"{bench.model_name}-base.gguf")
    path = bench.path(f"{bench.model_name}-lora-f16.gguf")
    adapter, lacks = stage_adapter(trained.folder, bench.path("adapter-staging"))
    try:
        staging = stage(trained.base_folder, trained.folder, [trained.folder, trained.base_folder], bench.path("base-staging"))
        convert(staging, base, precision=precision(trained.base_folder), name=bench.model_name)
        convert_lora(adapter, staging, path)
    except ProgramFailed as error:
        raise JobFailed("export_failed", f"the adapter could not be written as GGUF: {error}", USE_GGUF) from error
    bench.context.phase("verifying")
    examiner, candidate = Examiner(bench), Candidate(path, "f16", base=base, lacks=lacks)
    product = Product(name=NAME, kind="lora_gguf", path=path, key=bench.key("lora_gguf", path.name), fidelity=examiner.examine(candidate))
    tell_how(bench, candidate, examiner.prompt)
    note_fidelity(bench, [product])
    base.unlink()
    return (product,)


def stage_adapter(adapter: Path, staging: Path) -> tuple[Path, str]:
    """A copy of an adapter as llama.cpp's converter wants it, and what of it is not in the copy, in words. Raises JobFailed.

    llama.cpp scales by alpha / rank; a rank-stabilised adapter, whose scale is alpha / sqrt(rank), gets another alpha for it.
    """
    from safetensors.torch import load_file, save_file

    staging.mkdir(parents=True)
    settings: dict[str, Any] = json.loads((adapter / SETTINGS).read_text())  # Any: JSON
    tensors = load_file(adapter / WEIGHTS)
    kept = {name: tensor for name, tensor in tensors.items() if name.endswith(OF_LAYERS)}
    rows = [tensor for name, tensor in tensors.items() if name.endswith(OF_TOKENS)]
    if len(kept) + len(rows) < len(tensors) or settings.get("rank_pattern") or settings.get("alpha_pattern"):
        raise JobFailed("export_failed", "the adapter holds more than matrices of low rank, and its GGUF file could not", USE_GGUF)
    if settings.get("use_rslora"):
        settings |= {"lora_alpha": settings["lora_alpha"] * math.sqrt(settings["r"]), "use_rslora": False}
    save_file(kept, staging / WEIGHTS)
    write_json(staging / SETTINGS, settings)
    count = sum(len(tensor) for tensor in rows)
    return staging, f"the embeddings of {count} tokens that were trained as well" if count else ""
