"""A tiny Gemma 3 with random weights and its own tokenizer: the architecture of the real model in one megabyte."""

import io
import json
from pathlib import Path

SPECIAL_TOKENS = ("<start_of_turn>", "<end_of_turn>")
VOCAB_SIZE = 1024
WORDS = "what does the function do it returns a list of files copy open close read write path name value number string object call"


def build_tiny_gemma(folder: Path) -> Path:
    """Write model and tokenizer into `folder`, the same every time, and return it. Heavy imports happen here."""
    import torch
    from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "config.json").exists():
        return folder
    _write_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=6,  # llama.cpp treats every sixth layer of a Gemma 3 as full attention, regardless of the config
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=32,
        query_pre_attn_scalar=32,
        max_position_embeddings=2048,
        sliding_window=64,
        layer_types=["sliding_attention"] * 5 + ["full_attention"],
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    torch.manual_seed(7)
    model = Gemma3ForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:  # larger than the default, so that predictions differ clearly
            torch.nn.init.normal_(parameter, std=0.08)
    model.save_pretrained(folder)
    return folder


def _write_tokenizer(folder: Path) -> None:
    import sentencepiece
    from transformers import GemmaTokenizer

    words = WORDS.split()
    sentences = [" ".join(words[(i * k) % len(words)] for k in range(1, 12)) + f" {i}." for i in range(400)]
    sentences += ["def f(x):\n    return x + 1", "Ünïcödé – 模型 🙂"] * 5
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        hard_vocab_limit=False,
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        user_defined_symbols=list(SPECIAL_TOKENS),
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        character_coverage=1.0,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer = GemmaTokenizer.from_pretrained(folder, add_bos_token=True)
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(model.getvalue())  # the exporter expects this file, which the real model has


if __name__ == "__main__":
    import sys

    print(json.dumps({"folder": str(build_tiny_gemma(Path(sys.argv[1])))}))
