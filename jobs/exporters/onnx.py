"""The whole model for ONNX Runtime: one graph from token ids to logits, in float32, heard through ONNX Runtime before it goes out.

Made by transformers' own exporter, for small models: tracing one takes five times its weights in memory, and minutes. The graph reads a
whole sequence at once and keeps nothing between two calls: for scoring texts and for short answers, not for long ones.
"""

import json
import sys
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.errors import JobFailed
from jobs.exporters.examiner import EXACT_AGREEMENT, EXACT_KL_NATS, fidelity_of, speaks_alike
from jobs.exporters.folders import FIDELITY, SETTINGS_FILES, copy_files, copy_licence, copy_tokenizer, weights, write_json
from jobs.exporters.streaming import read_header
from jobs.llama.apart import ProgramFailed, run
from jobs.llama.fidelity import Comparison
from jobs.publish import Product

if TYPE_CHECKING:
    from jobs.exporters.bench import Bench
    from jobs.exporters.merge import Speech

MOST_PARAMETERS = 1_500_000_000  # 6 GB of float32, and 30 while it is traced
USE_OTHERS = "use export format merged, or include_gguf"
PROGRAM = "jobs.exporters.onnx_program"


def refuse_large(base: Path) -> None:
    """Raises JobFailed for a base that is too large to be traced: to be asked before the training."""
    parameters = sum(prod(tensor.shape) for name in weights(base) for tensor in read_header(base / name))
    if parameters > MOST_PARAMETERS:
        limit = f"export format onnx is for models of up to {MOST_PARAMETERS / 1e9:g} billion parameters"
        raise JobFailed("invalid_config", f"{limit}, and this one has {parameters / 1e9:.1f}", USE_OTHERS)


def export(bench: "Bench") -> tuple[Product, ...]:
    """The folder of the graph, its weights and the tokenizer. Raises JobFailed `export_failed`."""
    refuse_large(bench.trained.base_folder)
    whole, folder = bench.whole, bench.path("onnx")
    if bench.kind != "causal" or whole.speech is None:
        raise JobFailed("invalid_config", "export format onnx is for models of text that speak", USE_OTHERS)
    bench.context.phase("converting")
    try:
        run("onnx", [sys.executable, "-m", PROGRAM, "write", str(whole.folder), str(folder)])
        bench.context.phase("verifying")
        found = _heard(bench, folder, whole.speech)
    except ProgramFailed as error:
        raise JobFailed("export_failed", f"no ONNX file could be made: {error}", "the log of the attempt has all that it said") from error
    if not speaks_alike(found):
        message = (
            f"the ONNX file does not speak like the trained model: they agree on {found.argmax_agreement:.1%} of {found.positions} tokens "
            f"(at least {EXACT_AGREEMENT:.0%} are wanted), mean KL {found.mean_kl_to_trained:.4f} nats (at most {EXACT_KL_NATS})"
        )
        raise JobFailed("export_failed", message, USE_OTHERS)
    copy_files(whole.folder, folder, SETTINGS_FILES)
    copy_tokenizer(whole.folder, folder)
    copy_licence(whole.folder, folder)
    fidelity = fidelity_of(found)
    write_json(folder / FIDELITY, {"onnx": fidelity.model_dump(mode="json")})
    return (Product(name="onnx", kind="onnx", path=folder, key=bench.key("onnx"), fidelity=fidelity),)


def _heard(bench: "Bench", folder: Path, speech: "Speech") -> Comparison:
    asked, answered = bench.path("onnx-question.json"), bench.path("onnx-answer.json")
    base = str(speech.base_log_probs) if speech.base_log_probs else None
    passages = [passage.model_dump() for passage in speech.passages]
    asked.write_text(json.dumps({"passages": passages, "trained_log_probs": str(speech.log_probs), "base_log_probs": base}))
    run("onnx", [sys.executable, "-m", PROGRAM, "hear", str(folder), str(asked), str(answered)])
    return Comparison.load(answered.read_bytes())
