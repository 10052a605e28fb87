"""`python -m tests.attack.tiny_glm TOKENIZER FOLDER`: a tiny Glm4 with random weights.

llama.cpp's converter of that class loads the tokenizer with code of the model.
"""

import sys


def main() -> None:
    """Write the model with the tokenizer of another one. Runs in the trainer's environment."""
    import torch
    from transformers import AutoTokenizer, Glm4Config, Glm4ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    config = Glm4Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    torch.manual_seed(3)
    Glm4ForCausalLM(config).save_pretrained(sys.argv[2])
    tokenizer.save_pretrained(sys.argv[2])


if __name__ == "__main__":
    main()
