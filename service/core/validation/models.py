"""What can be known of a model without a download: by its name, and by what lies in the model store.

A name that nobody knows passes: the job looks again.
"""

import re
from dataclasses import dataclass

from schema.training import GrpoConfig, TrainingConfig
from schema.training.graders import TextSimilarityGrader
from service.core.errors import InvalidRequest
from storage import ObjectStore


@dataclass(frozen=True)
class KnownModel:
    """A family of models, known by how their names begin, whoever publishes the copy."""

    name: str
    has_vision: bool  # takes images beside text
    hidden_size: int  # of the hidden states: a LoRA of a higher rank has nothing left to be low in


# https://huggingface.co/google: `hidden_size` (of the text part) and the presence of a vision tower, in each config.json.
KNOWN_MODELS = (
    KnownModel("gemma-3-270m", has_vision=False, hidden_size=640),
    KnownModel("gemma-3-1b", has_vision=False, hidden_size=1152),
    KnownModel("gemma-3-4b", has_vision=True, hidden_size=2560),
    KnownModel("gemma-3-12b", has_vision=True, hidden_size=3840),
    KnownModel("gemma-3-27b", has_vision=True, hidden_size=5376),
)


def is_stored(models: ObjectStore, model_id: str) -> bool:
    """Whether the deployment has a copy of a model of its own. Raises StorageError."""
    return models.stat(f"pretrained_weights/huggingface/{model_id}/config.json") is not None


def check_embedding_models(config: TrainingConfig, models: ObjectStore) -> None:
    """Raise InvalidRequest when a grader compares by a model that the deployment does not have: such a model is never downloaded."""
    for n, grader in enumerate(config.reward_config if isinstance(config, GrpoConfig) else []):
        if not isinstance(grader, TextSimilarityGrader) or grader.embedding_model is None or grader.base_url is not None:
            continue
        if not is_stored(models, grader.embedding_model):
            folder = f"{models.url}/pretrained_weights/huggingface/{grader.embedding_model}/"
            raise InvalidRequest(
                f"grader {grader.name!r} compares by {grader.embedding_model}, which is not in this deployment's model store",
                hint=f"name an endpoint that has it as base_url, or put its files at {folder}",
                param=f"training_config.reward_config.{n}.embedding_model",
            )


def find_known_model(base_model_id: str) -> KnownModel | None:
    """What is known of a model by its name, if anything."""
    name = base_model_id.rpartition("/")[2].lower()
    return next((base for base in KNOWN_MODELS if re.match(rf"{re.escape(base.name)}(?![a-z0-9])", name)), None)
