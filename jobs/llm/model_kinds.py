"""The kinds of model that transformers loads, by what they compute from their input."""

from typing import Literal

ModelKind = Literal["causal", "score", "image_text"]

# ModelKind -> transformers' auto class.
AUTO_CLASSES: dict[ModelKind, str] = {
    "causal": "AutoModelForCausalLM",
    "score": "AutoModelForSequenceClassification",
    "image_text": "AutoModelForImageTextToText",
}
