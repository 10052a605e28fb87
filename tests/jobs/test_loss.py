"""The loss at labeled positions equals the library's; padding and packed neighbors do not change it; evaluations are exact."""

import math
from pathlib import Path
from typing import Any

import pytest

from jobs.llm.data.blocks import pack_rows
from jobs.llm.data.tokenize import IGNORE_INDEX, TokenizedExample, tokenize_split
from jobs.llm.loss import collate, compute_labeled_logits, evaluate_likelihood
from jobs.llm.trainable_tokens import patch_trainable_token_embedding
from jobs.llm.turn_ends import TurnEnds
from schema.training import SftConfig
from tests.jobs.conftest import make_row_tokenizer, messages
from tests.jobs.test_trainable_tokens import make_tuned_model


@pytest.fixture(scope="module")
def rows(tokenizer: Any) -> list[TokenizedExample]:
    return tokenize_split(iter(messages(9)), "messages", make_row_tokenizer(tokenizer), 128).rows


@pytest.fixture(scope="module")
def turn_ends(tokenizer: Any) -> TurnEnds:
    stop_ids = tokenizer.convert_tokens_to_ids(["<eos>", "<end_of_turn>"])
    return TurnEnds(stop_ids, tokenizer)


@pytest.fixture(scope="module", params=[None, 5.0], ids=["plain", "softcapped"])
def model(base: Path, request: pytest.FixtureRequest) -> Any:
    """With and without a soft cap on the logits, which some Gemma models have."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    loaded.config.final_logit_softcapping = request.param
    return loaded


def make_batch(rows: list[TokenizedExample], pad_id: int = 0) -> tuple[dict[str, Any], Any]:
    batch = collate([[row] for row in rows], pad_id)
    batch.pop("non_padding_tokens")
    return batch, batch.pop("labels")


def our_loss(model: Any, rows: list[TokenizedExample], pad_id: int = 0) -> Any:
    import torch

    logits, targets = compute_labeled_logits(model, *make_batch(rows, pad_id))
    return torch.nn.functional.cross_entropy(logits, targets)


def make_row(ids: list[int], label_from: int = 1) -> TokenizedExample:
    labels = [token if n >= label_from else IGNORE_INDEX for n, token in enumerate(ids)]
    return TokenizedExample(input_ids=ids, labels=labels, prompt_text="", prompt_tokens=label_from)


def gradients_of(model: Any, loss: Any) -> dict[str, Any]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def assert_same_gradients(ours: dict[str, Any], stock: dict[str, Any]) -> None:
    import torch

    assert ours.keys() == stock.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, stock[name], rtol=1e-4, atol=1e-5 * float(stock[name].abs().max()), msg=name)


def stock_loss(model: Any, rows: list[TokenizedExample]) -> Any:
    batch, labels = make_batch(rows)
    return model(**batch, labels=labels).loss


def test_loss_and_gradients_match_stock(model: Any, rows: list[TokenizedExample]) -> None:
    ours, stock = our_loss(model, rows), stock_loss(model, rows)
    assert ours.item() == pytest.approx(stock.item(), rel=1e-6)
    assert_same_gradients(gradients_of(model, ours), gradients_of(model, stock))


def test_loss_with_lora_and_token_embeddings_matches_stock(base: Path, rows: list[TokenizedExample]) -> None:
    model = make_tuned_model(base)
    stock = stock_loss(model, rows)
    expected = gradients_of(model, stock)
    patch_trainable_token_embedding(model)
    ours = our_loss(model, rows)
    assert ours.item() == pytest.approx(stock.item(), rel=1e-6)
    actual = gradients_of(model, ours)
    assert any("lora_A" in name for name in actual)
    assert_same_gradients(actual, expected)


def test_padding_is_never_labeled_and_pad_token_does_not_matter(model: Any, rows: list[TokenizedExample]) -> None:
    batch, labels = make_batch(rows)
    assert (labels[batch["attention_mask"] == 0] == IGNORE_INDEX).all()
    assert int((labels != IGNORE_INDEX).sum()) == sum(sum(label != IGNORE_INDEX for label in row.labels) for row in rows)
    assert our_loss(model, rows, pad_id=0).item() == pytest.approx(our_loss(model, rows, pad_id=77).item(), rel=1e-6)


def test_packing_keeps_all_rows_whole(rows: list[TokenizedExample]) -> None:
    blocks = list(pack_rows(rows, 64))
    assert sorted(row.input_ids for block in blocks for row in block) == sorted(row.input_ids for row in rows)
    assert all(sum(len(row.input_ids) for row in block) <= 64 for block in blocks)
    assert len(blocks) < len(rows)


def test_packed_row_does_not_attend_to_neighbors(model: Any, rows: list[TokenizedExample]) -> None:
    import torch

    def logits_of_last(first: TokenizedExample) -> Any:
        batch = collate([[first, rows[1], rows[2]], [rows[3]]], 0)
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
        start = len(first.input_ids) + len(rows[1].input_ids)
        return logits[start : start + len(rows[2].input_ids)]

    other = make_row(list(reversed(rows[0].input_ids)))
    torch.testing.assert_close(logits_of_last(rows[0]), logits_of_last(other), rtol=0, atol=1e-5)
    with torch.no_grad():
        alone = model(input_ids=torch.tensor([rows[2].input_ids]), use_cache=False).logits[0]
    torch.testing.assert_close(logits_of_last(rows[0]), alone, rtol=0, atol=2e-5)


def test_packed_and_padded_rows_have_the_same_loss(model: Any, rows: list[TokenizedExample]) -> None:
    import torch

    packed = collate(list(pack_rows(rows, 96)), 0)
    assert int(packed.pop("non_padding_tokens")) == sum(len(row.input_ids) for row in rows)
    labels = packed.pop("labels")
    logits, targets = compute_labeled_logits(model, packed, labels)
    assert torch.nn.functional.cross_entropy(logits, targets).item() == pytest.approx(our_loss(model, rows).item(), rel=1e-5)


def test_packed_rows_have_same_gradients_as_single_rows(model: Any, rows: list[TokenizedExample]) -> None:
    import torch

    blocks = list(pack_rows(rows, 100))  # longer than the attention window
    assert len(blocks) > 1
    packed = collate(blocks, 0)
    count = packed.pop("non_padding_tokens")
    assert count < packed["input_ids"].numel()  # some positions are padding
    logits, targets = compute_labeled_logits(model, packed, packed.pop("labels"))
    together = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    packed_gradients = gradients_of(model, together)
    alone = sum(our_loss(model, [row]) * sum(label != IGNORE_INDEX for label in row.labels[1:]) for row in rows)
    assert together.item() == pytest.approx(alone.item(), rel=1e-5)
    assert_same_gradients(packed_gradients, gradients_of(model, alone))


def test_blocks_of_a_batch_may_be_joined(model: Any, rows: list[TokenizedExample]) -> None:
    import torch

    batches = collate([rows[:2], [rows[2]]], 0), collate([rows[:3]], 0)
    assert batches[0].pop("non_padding_tokens") == batches[1].pop("non_padding_tokens")
    losses = []
    for inputs in batches:
        logits, targets = compute_labeled_logits(model, inputs, inputs.pop("labels"))
        losses.append(torch.nn.functional.cross_entropy(logits, targets).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_first_token_of_packed_row_has_no_label(rows: list[TokenizedExample]) -> None:
    text = make_row([5, 6, 7], label_from=0)
    labels = collate([[text, text]], 0)["labels"][0].tolist()
    assert labels == [IGNORE_INDEX, 6, 7, IGNORE_INDEX, 6, 7]


@pytest.mark.parametrize("batch_eval_metrics", [False, True])
def test_evaluation_counts_every_labeled_token_once(
    model: Any, rows: list[TokenizedExample], turn_ends: TurnEnds, batch_eval_metrics: bool
) -> None:
    import torch

    eval_config = {"compute_eval_metrics": True, "batch_eval_metrics": batch_eval_metrics}
    config = SftConfig.model_validate({"base_model_id": "a/b", "hyperparameters": {"batch_size": 4}, "eval_config": eval_config})
    loss, correct, count, content_losses = 0.0, 0, 0, list[float]()
    for row in rows:  # one at a time, without padding, position by position
        with torch.no_grad():
            scores = torch.log_softmax(model(input_ids=torch.tensor([row.input_ids])).logits[0].float(), dim=-1)
        for n in range(1, len(row.input_ids)):
            if row.labels[n] != IGNORE_INDEX:
                loss -= scores[n - 1, row.labels[n]].item()
                if n < len(row.input_ids) - 2:  # <end_of_turn> and a newline end every row
                    content_losses.append(-scores[n - 1, row.labels[n]].item())
                correct += int(scores[n - 1].argmax()) == row.labels[n]
                count += 1
    metrics = evaluate_likelihood(model, rows, 0, config, turn_ends)
    assert metrics.eval_loss == pytest.approx(loss / count, rel=1e-5)
    assert metrics.perplexity == pytest.approx(math.exp(loss / count), rel=1e-5)
    assert metrics.content_perplexity == pytest.approx(math.exp(sum(content_losses) / len(content_losses)), rel=1e-5)
    assert (metrics.accuracy, metrics.eval_tokens, metrics.eval_rows) == (correct / count, count, len(rows))
    assert metrics.eval_runtime is not None
    assert metrics.eval_runtime > 0


def test_accuracy_is_measured_only_on_request(model: Any, rows: list[TokenizedExample], turn_ends: TurnEnds) -> None:
    assert evaluate_likelihood(model, rows, 0, SftConfig(base_model_id="a/b"), turn_ends).accuracy is None
