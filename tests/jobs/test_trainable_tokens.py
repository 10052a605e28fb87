"""Patched trainable tokens give the same results and files as peft's own."""

from pathlib import Path
from typing import Any

import pytest

from jobs.llm.trainable_tokens import patch_trainable_token_embedding

TOKENS = [4, 5]  # <start_of_turn>, <end_of_turn>


def make_tuned_model(base: Path, dtype: str = "float32") -> Any:
    """The tiny base with LoRA and trainable tokens, all with changed weights."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], trainable_token_indices=TOKENS, task_type="CAUSAL_LM")
    tuned = get_peft_model(model, lora).eval()
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "trainable_tokens_delta" in name or "lora_B" in name:
                weight += 0.05 * torch.randn_like(weight)
    return tuned


def make_input_ids(count: int = 2) -> Any:
    """Rows with the trainable tokens at the start, at the end, twice, and not at all."""
    import torch

    return torch.tensor([[2, 4, 987, 315, 5, 4, 300, 5], [4, 10, 11, 12, 13, 14, 15, 16], [20, 21, 22, 23, 24, 25, 26, 27]])[:count]


def compute_logits_and_gradients(model: Any, ids: Any) -> tuple[Any, dict[str, Any]]:
    """The logits, and the gradients of a loss that depends on all of them."""
    model.zero_grad()
    logits = model(input_ids=ids).logits
    logits.float().log_softmax(-1).square().mean().backward()
    return logits.detach(), {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize(("dtype", "rtol", "atol"), [("float32", 1e-4, 1e-5), ("bfloat16", 5e-2, 5e-2)])
def test_logits_and_gradients_match_peft(base: Path, dtype: str, rtol: float, atol: float) -> None:
    import torch

    model, ids = make_tuned_model(base, dtype), make_input_ids(3)
    theirs, their_gradients = compute_logits_and_gradients(model, ids)
    assert patch_trainable_token_embedding(model) == 2  # the embedding, and the head tied to it
    ours, our_gradients = compute_logits_and_gradients(model, ids)
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)
    assert our_gradients.keys() == their_gradients.keys()
    assert any("trainable_tokens_delta" in name for name in our_gradients)
    for name, gradient in our_gradients.items():
        largest = float(their_gradients[name].float().abs().max())
        torch.testing.assert_close(gradient, their_gradients[name], rtol=rtol, atol=atol * largest)


def test_only_lora_and_token_rows_are_trained(base: Path) -> None:
    model = make_tuned_model(base)
    patch_trainable_token_embedding(model)
    trained = {name: weight.shape for name, weight in model.named_parameters() if weight.requires_grad and "lora_" not in name}
    assert list(trained.values()) == [(len(TOKENS), 64)]


def test_logits_of_selected_positions_match_full_logits(base: Path) -> None:
    import torch

    model, ids = make_tuned_model(base), make_input_ids()
    patch_trainable_token_embedding(model)
    columns = torch.tensor([1, 4, 6])
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids, logits_to_keep=columns).logits, model(input_ids=ids).logits[:, columns])


def test_disabled_adapter_gives_base_logits(base: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model, ids = make_tuned_model(base), make_input_ids()
    patch_trainable_token_embedding(model)
    with torch.no_grad(), model.disable_adapter():
        logits = model(input_ids=ids).logits
        torch.testing.assert_close(logits, AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)(input_ids=ids).logits)


def test_merged_model_gives_same_logits(base: Path) -> None:
    import torch

    model, ids = make_tuned_model(base), make_input_ids(3)
    patch_trainable_token_embedding(model)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        torch.testing.assert_close(model.merge_and_unload()(input_ids=ids).logits, before, rtol=1e-4, atol=1e-4)


def test_saved_adapter_loads_with_peft_and_gives_same_logits(base: Path, tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model, ids = make_tuned_model(base), make_input_ids(3)
    patch_trainable_token_embedding(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


def test_model_without_trained_tokens_is_unchanged(base: Path) -> None:
    from transformers import AutoModelForCausalLM

    assert patch_trainable_token_embedding(AutoModelForCausalLM.from_pretrained(base)) == 0
