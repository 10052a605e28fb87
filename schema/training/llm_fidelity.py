"""What is measured of an exported language model: `Artifact.fidelity`."""

from schema.base import ForwardCompatible


class Fidelity(ForwardCompatible):
    """How closely an exported file matches the trained model, measured on held-out prompts."""

    compared_tokens: int
    argmax_agreement: float  # share of positions where both rank the same next token first, 0..1
    mean_kl_to_merged: float  # nats; KL divergence from the trained model
    mean_kl_to_base: float | None = None  # nats; KL divergence from the base model
    sample_prompt: str = ""
    sample_text: str = ""  # the file's answer to it
    closer_to_base: bool = False  # closer to the base than to the trained model
    labeled_tokens: int = 0  # of the compared tokens, those that a held-out row labels
    perplexity: float | None = None  # of the file, on the labeled tokens
    perplexity_merged: float | None = None  # of the trained model, on the same tokens
    perplexity_base: float | None = None
    imatrix: bool = False  # quantized with an importance matrix of the training rows
    advice: str = ""  # how to improve the file, where that is needed
