"""Text embeddings from an OpenAI-compatible endpoint, or from a model in the deployment's model store."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from jobs.llm.base_model import download_from_store
from jobs.llm.graders.base import FailedGrade
from jobs.llm.graders.endpoint import Endpoint, check_base_url
from jobs.runtime.errors import JobFailed
from jobs.runtime.settings import read_egress_policy
from schema.training.llm_graders import TextSimilarityGrader

if TYPE_CHECKING:
    from numpy import ndarray

    from jobs.runtime.context import JobContext

BATCH_SIZE = 64
MAX_CONCURRENT_REQUESTS = 4
TIMEOUT_S = 60.0
MAX_SEQUENCE_TOKENS = 512  # what most embedding models were trained with
TEST_TEXT = "a text"


class Embedder(Protocol):
    """Computes embeddings of texts."""

    def check(self) -> None:
        """Raise JobFailed when it cannot compute embeddings."""
        ...

    def embed(self, texts: Sequence[str]) -> list[Any]:
        """A vector or a FailedGrade for each text."""
        ...

    def close(self) -> None:
        """Release the model or the connections."""
        ...


def endpoint_embedder(config: TextSimilarityGrader, context: "JobContext") -> "EndpointEmbedder":
    """The embedder for an endpoint's model. Raises JobFailed for an endpoint that the egress policy refuses."""
    assert config.embedding_model is not None  # the schema requires it with base_url
    assert config.base_url is not None  # the caller has looked
    policy = read_egress_policy()
    check_base_url(config.name, config.base_url, policy)
    endpoint = Endpoint(config.base_url, context.secrets.get(config.secret_name), TIMEOUT_S, policy)
    return EndpointEmbedder(config.name, config.embedding_model, endpoint)


def stored_embedder(name: str, context: "JobContext") -> "StoredEmbedder":
    """The embedder for the model at pretrained_weights/huggingface/{name}/ in the model store. Raises JobFailed."""
    folder = download_from_store(
        context.stores.models, f"pretrained_weights/huggingface/{name}/", context.workdir / "data" / "embedding", kind="embedding model"
    )
    if folder is None:
        hint = f"put its files at pretrained_weights/huggingface/{name}/ in the model store, or set base_url to an endpoint"
        raise JobFailed("invalid_config", f"embedding model {name} is not in the model store", hint)
    return StoredEmbedder(folder)


class EndpointEmbedder:
    """Embeddings by POST {base_url}/embeddings."""

    def __init__(self, grader_name: str, model: str, endpoint: Endpoint) -> None:
        self._grader_name = grader_name
        self._model = model
        self._endpoint = endpoint

    def check(self) -> None:
        """Raise JobFailed when the endpoint does not return an embedding."""
        from openai import OpenAIError

        [response] = self._endpoint.send_all(self._request_embeddings, [[TEST_TEXT]], max_concurrency=1)
        if isinstance(response, OpenAIError):
            raise self._endpoint.make_job_failed(self._grader_name, response)
        if isinstance(response[0], FailedGrade):
            raise JobFailed(
                "invalid_config", f"grader {self._grader_name!r}: {response[0].reason}", "check the grader's base_url and model"
            )

    def embed(self, texts: Sequence[str]) -> list[Any]:
        """A vector or a FailedGrade for each text; a failed batch does not affect the others."""
        batches = [texts[n : n + BATCH_SIZE] for n in range(0, len(texts), BATCH_SIZE)]
        responses = self._endpoint.send_all(self._request_embeddings, batches, max_concurrency=MAX_CONCURRENT_REQUESTS)
        results: list[Any] = []
        for batch, response in zip(batches, responses, strict=True):
            results += response if isinstance(response, list) else [self._endpoint.make_failed_grade(response)] * len(batch)
        return results

    def close(self) -> None:
        """Close the connections."""
        self._endpoint.close()

    async def _request_embeddings(self, batch: Sequence[str]) -> list[Any]:
        import numpy

        response = await self._endpoint.client.embeddings.create(model=self._model, input=list(batch), encoding_format="float")
        vectors = {entry.index: numpy.asarray(entry.embedding, dtype=float) for entry in response.data}
        missing = FailedGrade(f"{self._endpoint.base_url} answered with fewer embeddings than texts")
        return [vectors.get(n, missing) for n in range(len(batch))]


class StoredEmbedder:
    """Mean-pooled last hidden states of a stored model, computed on the CPU."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoModel, AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        # Loading initializes missing weights randomly, which must not change the training's random state.
        with torch.random.fork_rng(devices=[]):
            self._model = AutoModel.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False, use_safetensors=True).eval()
        model_limit = getattr(self._model.config, "max_position_embeddings", MAX_SEQUENCE_TOKENS)  # some architectures have none
        self._max_tokens = min(MAX_SEQUENCE_TOKENS, int(model_limit))

    def check(self) -> None:
        """Loading has succeeded already."""

    def embed(self, texts: Sequence[str]) -> list[Any]:
        """A vector for each text, of at most MAX_SEQUENCE_TOKENS tokens."""
        return [vector for n in range(0, len(texts), BATCH_SIZE) for vector in self._embed_batch(texts[n : n + BATCH_SIZE])]

    def close(self) -> None:
        """There is nothing to close."""

    def _embed_batch(self, texts: Sequence[str]) -> "ndarray":
        import torch

        batch = self._tokenizer(list(texts), return_tensors="pt", padding=True, truncation=True, max_length=self._max_tokens)
        with torch.inference_mode():
            states = self._model(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1)
            return ((states * mask).sum(1) / mask.sum(1).clamp(min=1)).double().numpy()
