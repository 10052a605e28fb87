"""The architectures of the matrix: the config of each tiny model, its special tokens and its chat template."""

from dataclasses import dataclass, field
from typing import Any, Literal

# Templates that TRL does not ship, in the families' own format.
CHATML_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ '[INST]' + message['content'] + '[/INST]' }}{% endif %}{% endfor %}"
)

LAYERS = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}
HEAD_DIM = {"head_dim": 32}
GEMMA_LAYERS = LAYERS | ATTENTION | HEAD_DIM | {"query_pre_attn_scalar": 32, "sliding_window": 64}


@dataclass(frozen=True)
class TinyArchitecture:
    """One architecture: how its tiny model is made, and what it is able to do."""

    title: str
    config_class: str  # of transformers; the model class follows from it
    settings: dict[str, Any]
    tokenizer: Literal["sentencepiece", "sentencepiece_with_prefix", "byte_level"]
    template: str  # a file of TRL's chat templates, or the template itself
    turn_tokens: tuple[str, ...]
    eos: str
    bos: str | None = None
    pad: str | None = None
    vocab_padding: int = 1  # the embedding's rows are a multiple of this, as in bases whose embedding is larger than the tokenizer
    config_extra: dict[str, Any] = field(default_factory=dict)
    carries_state: bool = False  # a recurrence or a convolution passes one row's state to the next one of a block
    experts: bool = False
    attention: str = "sdpa"


ARCHITECTURES: dict[str, TinyArchitecture] = {
    "gemma2": TinyArchitecture(
        title="Gemma 2",
        config_class="Gemma2Config",
        settings=GEMMA_LAYERS | {"layer_types": ["sliding_attention", "full_attention"], "tie_word_embeddings": True},
        tokenizer="sentencepiece",
        template="gemma.jinja",
        turn_tokens=("<start_of_turn>", "<end_of_turn>"),
        eos="<eos>",
        bos="<bos>",
        pad="<pad>",
        attention="eager",
    ),
    "gemma3": TinyArchitecture(
        title="Gemma 3",
        config_class="Gemma3TextConfig",
        # llama.cpp treats every sixth layer of a Gemma 3 as full attention, regardless of the config
        settings=GEMMA_LAYERS | {"num_hidden_layers": 6, "layer_types": ["sliding_attention"] * 5 + ["full_attention"]},
        tokenizer="sentencepiece",
        template="gemma3.jinja",
        turn_tokens=("<start_of_turn>", "<end_of_turn>"),
        eos="<eos>",
        bos="<bos>",
        pad="<pad>",
    ),
    "gemma4": TinyArchitecture(
        title="Gemma 4",
        config_class="Gemma4TextConfig",
        settings=LAYERS
        | ATTENTION
        | HEAD_DIM
        | {
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 64,
            "global_head_dim": 64,
            "hidden_size_per_layer_input": 16,
            "tie_word_embeddings": True,
        },
        tokenizer="sentencepiece",
        template="gemma4.jinja",
        turn_tokens=("<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>'),
        eos="<eos>",
        bos="<bos>",
        pad="<pad>",
    ),
    "llama3": TinyArchitecture(
        title="Llama 3",
        config_class="LlamaConfig",
        settings=LAYERS | ATTENTION | {"tie_word_embeddings": False},
        tokenizer="byte_level",
        template="llama3.jinja",
        turn_tokens=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        eos="<|eot_id|>",
        bos="<|begin_of_text|>",  # and no padding token
    ),
    "qwen3": TinyArchitecture(
        title="Qwen 3",
        config_class="Qwen3Config",
        settings=LAYERS | ATTENTION | HEAD_DIM | {"tie_word_embeddings": True},
        tokenizer="byte_level",
        template="qwen3.jinja",
        turn_tokens=("<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>"),
        eos="<|im_end|>",
        pad="<|endoftext|>",
        vocab_padding=128,
    ),
    "qwen3_5": TinyArchitecture(
        title="Qwen 3.5",
        config_class="Qwen3_5TextConfig",
        settings=LAYERS
        | ATTENTION
        | HEAD_DIM
        | {
            "num_hidden_layers": 4,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "tie_word_embeddings": True,
        },
        tokenizer="byte_level",
        template="qwen3_5_nothink.jinja",
        turn_tokens=("<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>"),
        eos="<|im_end|>",
        pad="<|endoftext|>",
        vocab_padding=128,
        carries_state=True,
    ),
    "mistral": TinyArchitecture(
        title="Mistral",
        config_class="MistralConfig",
        settings=LAYERS | ATTENTION | {"sliding_window": None, "tie_word_embeddings": False},
        tokenizer="sentencepiece",
        template=MISTRAL_TEMPLATE,
        turn_tokens=("[INST]", "[/INST]"),
        eos="</s>",
        bos="<s>",
        pad="</s>",  # the same token as the end of a text
    ),
    "phi3": TinyArchitecture(
        title="Phi 3",
        config_class="Phi3Config",
        settings=LAYERS | ATTENTION | {"original_max_position_embeddings": 2048, "sliding_window": 2047, "tie_word_embeddings": False},
        tokenizer="sentencepiece_with_prefix",
        template="phi3.jinja",
        turn_tokens=("</s>", "<|assistant|>", "<|end|>", "<|system|>", "<|user|>"),  # llama.cpp looks for </s> in every Phi 3
        eos="<|endoftext|>",
        bos="<s>",
        pad="<|endoftext|>",
        vocab_padding=64,
    ),
    "smollm2": TinyArchitecture(
        title="SmolLM 2",
        config_class="LlamaConfig",
        settings=LAYERS | ATTENTION | {"tie_word_embeddings": True},
        tokenizer="byte_level",
        template=CHATML_TEMPLATE,
        turn_tokens=("<|im_start|>", "<|im_end|>"),
        eos="<|im_end|>",
        bos="<|im_start|>",
        pad="<|im_end|>",
    ),
    "smollm3": TinyArchitecture(
        title="SmolLM 3",
        config_class="SmolLM3Config",
        settings=LAYERS | ATTENTION | {"num_hidden_layers": 4, "no_rope_layer_interval": 4, "tie_word_embeddings": True},
        tokenizer="byte_level",
        template=CHATML_TEMPLATE,
        turn_tokens=("<|im_start|>", "<|im_end|>"),
        eos="<|im_end|>",
        pad="<|endoftext|>",
    ),
    "qwen3_moe": TinyArchitecture(
        title="Qwen 3 mixture of experts",
        config_class="Qwen3MoeConfig",
        settings=LAYERS
        | ATTENTION
        | HEAD_DIM
        | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True, "tie_word_embeddings": False},
        tokenizer="byte_level",
        template="qwen3.jinja",
        turn_tokens=("<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>"),
        eos="<|im_end|>",
        pad="<|endoftext|>",
        vocab_padding=128,
        experts=True,
    ),
    "gpt_oss": TinyArchitecture(
        title="gpt-oss",
        config_class="GptOssConfig",
        settings=LAYERS
        | ATTENTION
        | HEAD_DIM
        | {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            # llama.cpp rounds the limits of YaRN's interpolation to whole dimensions, and transformers does not for gpt-oss
            "rope_parameters": {"rope_type": "default", "rope_theta": 150_000.0},
            "sliding_window": 64,
            "layer_types": ["sliding_attention", "full_attention"],
            "tie_word_embeddings": False,
        },
        tokenizer="byte_level",
        template="gptoss.jinja",
        turn_tokens=("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>", "<|call|>", "<|constrain|>"),
        eos="<|return|>",
        bos="<|startoftext|>",
        pad="<|endoftext|>",
        experts=True,
        attention="eager",
    ),
    "lfm2": TinyArchitecture(
        title="LFM2",
        config_class="Lfm2Config",
        settings=LAYERS
        | ATTENTION
        | {
            "layer_types": ["conv", "full_attention"],
            "block_auto_adjust_ff_dim": False,
            "block_multiple_of": 64,
            "tie_word_embeddings": True,
        },
        tokenizer="byte_level",
        template="lfm2.jinja",
        turn_tokens=("<|im_start|>", "<|im_end|>"),
        eos="<|im_end|>",
        bos="<|startoftext|>",
        pad="<|pad|>",
        carries_state=True,
    ),
}
