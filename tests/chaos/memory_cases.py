"""`python -m tests.chaos.memory_cases FOLDER full|short`, in the trainer's environment: simulate running out of memory.

The real trainer trains a tiny Gemma. torch's embedding lookup, which every forward pass uses, raises a GPU's out-of-memory error for
batches larger than a limit, from step k on, in training or in evaluation. All weights are trained in fp32: in bf16 the order of a sum
shows in the third digit. Prints a line of JSON.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jobs.llm.trainers.sft import train
from jobs.runtime.batch_config import BatchConfig
from jobs.runtime.errors import JobFailed
from schema.events import DecisionMade
from tests.chaos.out_of_memory import BATCH_SIZE, MemoryCase
from tests.jobs.conftest import BASE, EventRecorder, load_saved_checkpoints, make_context, make_spec, messages
from tests.tiny_gemma import build_tiny_gemma

CASES: dict[str, list[MemoryCase]] = {
    "full": [
        *(MemoryCase("training", step, rows) for step in (1, 2, 3) for rows in (8, 4, 2, 1)),
        *(MemoryCase("evaluation", 0, rows) for rows in (8, 4, 2, 1)),
        MemoryCase("training", 2, 0),
        MemoryCase("evaluation", 0, 0),
    ],
    "short": [MemoryCase("training", 3, 4), MemoryCase("evaluation", 0, 2), MemoryCase("training", 2, 0)],
}
HYPERPARAMETERS = {"max_steps": -1, "epochs": 2, "learning_rate": 1e-4, "save_strategy": "steps", "save_steps": 1}


@dataclass
class StepRecorder(EventRecorder):
    """An event sink that records the current step."""

    step: int = 0

    def set_progress(self, *, phase: Any = None, progress: Any = None) -> None:
        self.step = progress.step if progress else self.step


def main() -> None:
    """Train a reference with enough memory, then every case."""
    folder, size = Path(sys.argv[1]), sys.argv[2]
    build_tiny_gemma(folder / "objects/pretrained_weights/huggingface" / BASE)
    reference = _train(folder, MemoryCase("training", 0, BATCH_SIZE))
    print(json.dumps({"reference": reference, "cases": [asdict(case) | _train(folder, case) for case in CASES[size]]}))


def _train(folder: Path, case: MemoryCase) -> dict[str, Any]:
    """Train once; return losses by step, the batch sizes it used and the failure."""
    hyperparameters = HYPERPARAMETERS | {"batch_size": BATCH_SIZE, "gradient_accumulation_steps": 1}
    held_out = messages(BATCH_SIZE, first=100)  # the rows of one evaluation batch
    spec = make_spec(folder / "objects", method="Full", hyperparameters=hyperparameters, held_out=held_out)
    recorder, failure = StepRecorder(), None
    context = make_context(spec, folder / spec.job_id, recorder)
    with _limit_memory(case, recorder) as failures:
        try:
            train(spec.training_config, context)
        except JobFailed as error:
            failure = error.failure
        finally:
            context.checkpoints.wait_until_uploaded()
            context.checkpoints.close()
    after = [event.metrics.eval_loss for event in recorder.evaluations if event.when == "after"]
    return {
        "losses": {point.step: point.values["loss"] for point in recorder.points},
        "eval_loss": after[-1] if after else None,
        "reduced_batch_sizes": [
            int(event.value) for event in recorder.events if isinstance(event, DecisionMade) and event.setting == "batch_size"
        ],
        "effective_batch_sizes": sorted(
            {BatchConfig.from_details(checkpoint.details).effective_batch_size for checkpoint in load_saved_checkpoints(spec)}
        ),
        "failures": len(failures),
        "failure": failure and failure.model_dump(),
    }


@contextmanager
def _limit_memory(case: MemoryCase, recorder: StepRecorder) -> Iterator[list[int]]:
    """Limit the memory during the block; yield the list of rejected batch sizes."""
    import torch

    embedding, rejected = torch.nn.functional.embedding, list[int]()

    def look_up(tokens: Any, *rest: Any, **named: Any) -> Any:
        is_limited = torch.is_grad_enabled() == (case.phase == "training") and recorder.step + 1 >= case.step
        if is_limited and len(tokens) > case.rows_that_fit:
            rejected.append(len(tokens))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return embedding(tokens, *rest, **named)

    torch.nn.functional.embedding = look_up
    try:
        yield rejected
    finally:
        torch.nn.functional.embedding = embedding


if __name__ == "__main__":
    main()
