"""A tiny vision-language Gemma 3 with random weights and the same files as the real model, in two megabytes.

An image is `TOKENS_PER_IMAGE` soft tokens between <start_of_image> and <end_of_image>; the real model has 256 of them.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.tiny_gemma import build_tiny_gemma

IMAGE_TOKENS = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
TOKENS_PER_IMAGE = 4
IMAGE_SIZE = 28  # pixels; 16 patches of 7 x 7


def build_tiny_gemma_vision(folder: Path) -> Path:
    """Write model, tokenizer and image settings into `folder`, the same every time, and return it. Heavy imports happen here."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(folder)
    _write_processor(folder)
    _write_model(folder)
    return folder


def _write_tokenizer(folder: Path) -> None:
    from transformers import AutoTokenizer

    with TemporaryDirectory() as text:
        text_model = build_tiny_gemma(Path(text))
        tokenizer = AutoTokenizer.from_pretrained(text_model, extra_special_tokens=IMAGE_TOKENS)
        tokenizer.save_pretrained(folder)
        (folder / "tokenizer.model").write_bytes((text_model / "tokenizer.model").read_bytes())


def _write_processor(folder: Path) -> None:
    """Write the processor files of google/gemma-3-4b-it, with smaller sizes."""
    images = {
        "do_convert_rgb": None,
        "do_normalize": True,
        "do_pan_and_scan": None,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "Gemma3ImageProcessor",
        "image_seq_length": TOKENS_PER_IMAGE,
        "image_std": [0.5, 0.5, 0.5],
        "pan_and_scan_max_num_crops": None,
        "pan_and_scan_min_crop_size": None,
        "pan_and_scan_min_ratio_to_activate": None,
        "processor_class": "Gemma3Processor",
        "resample": 2,
        "rescale_factor": 0.00392156862745098,
        "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(images, indent=2))
    processor = {"image_seq_length": TOKENS_PER_IMAGE, "processor_class": "Gemma3Processor"}
    (folder / "processor_config.json").write_text(json.dumps(processor, indent=2))


def _write_model(folder: Path) -> None:
    import torch
    from transformers import AutoTokenizer, Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = Gemma3TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=6,
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
    )
    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=7,
        vision_use_head=False,
    )
    ids = {name.replace("token", "token_index"): tokenizer.convert_tokens_to_ids(token) for name, token in IMAGE_TOKENS.items()}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=TOKENS_PER_IMAGE, tie_word_embeddings=True, **ids)
    torch.manual_seed(7)
    model = Gemma3ForConditionalGeneration(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:  # larger than the default, so that predictions differ clearly and depend on the image
            torch.nn.init.normal_(parameter, std=0.08)
    model.save_pretrained(folder)


if __name__ == "__main__":
    import sys

    print(json.dumps({"folder": str(build_tiny_gemma_vision(Path(sys.argv[1])))}))
