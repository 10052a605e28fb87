"""Writes a tiny model: random weights in the architecture's own layers, and a tokenizer that llama.cpp's converter accepts.

Three kinds of tokenizer, as the families have them:

    sentencepiece               trained on a few sentences; the converter reads its tokenizer.model
    sentencepiece_with_prefix   the same, with a space before every text, and turn tokens that swallow the white space behind them
    byte_level                  GPT-2's bytes, and those of its merges that one text and our words need, with their token ids

The converter recognizes a byte-level tokenizer by the ids of that text, which is in its source; GPT-2's vocabulary is among llama.cpp's own
test files. All other text falls apart into smaller pieces. Unused ids are filled with tokens that no text contains.
"""

import ast
import io
import re
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jobs.llm.llama_cpp import LLAMA_CPP_FOLDER
from tests.tiny_gemma import WORDS
from tests.tiny_models.architectures import ARCHITECTURES, TinyArchitecture

VOCAB_SIZE = 1024  # of a sentencepiece tokenizer
GPT2_VOCABULARY = LLAMA_CPP_FOLDER / "models" / "ggml-vocab-gpt-2.gguf"


def build_tiny_model(name: str, folder: Path) -> Path:
    """Write the model of an architecture into `folder`, the same every time, and return it. Heavy imports happen here."""
    import torch
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "config.json").exists():
        return folder
    architecture = ARCHITECTURES[name]
    tokenizer = _write_tokenizer(architecture, folder)
    size = max(tokenizer.get_vocab().values()) + 1
    settings = architecture.settings | {
        "vocab_size": size + -size % architecture.vocab_padding,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if name == "gemma4":
        settings["vocab_size_per_layer_input"] = settings["vocab_size"]
    config = getattr(transformers, architecture.config_class)(**settings)
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:  # larger than the default, so that predictions differ clearly
            torch.nn.init.normal_(parameter, std=0.08)
    model.save_pretrained(folder)
    return folder


def _write_tokenizer(architecture: TinyArchitecture, folder: Path) -> Any:
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    named = {"eos_token": architecture.eos, "bos_token": architecture.bos, "pad_token": architecture.pad}
    backend = _make_byte_level() if architecture.tokenizer == "byte_level" else _make_sentencepiece(architecture, folder)
    has_prefix = architecture.tokenizer == "sentencepiece_with_prefix"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        additional_special_tokens=[AddedToken(token, special=True, rstrip=has_prefix) for token in architecture.turn_tokens],
        clean_up_tokenization_spaces=False,
        add_prefix_space=has_prefix,
        **{key: token for key, token in named.items() if token is not None},
    )
    tokenizer.chat_template = _read_template(architecture.template)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _read_template(template: str) -> str:
    if template.endswith(".jinja"):
        return files("trl").joinpath("chat_templates", template).read_text(encoding="utf-8")
    return template


def _make_sentencepiece(architecture: TinyArchitecture, folder: Path) -> Any:
    """Train a tokenizer.model in `folder`, and return it as transformers reads it, with bytes for unknown characters."""
    import json

    import sentencepiece
    from tokenizers import Tokenizer
    from transformers import GemmaTokenizer

    has_prefix = architecture.tokenizer == "sentencepiece_with_prefix"
    bos, eos = architecture.bos or "<s>", architecture.eos
    pad = architecture.pad if architecture.pad not in (None, bos, eos) else "<pad>"
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
        pad_piece=pad,
        eos_piece=eos,
        bos_piece=bos,
        user_defined_symbols=[token for token in architecture.turn_tokens if token not in (bos, eos, pad)],
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=has_prefix,
        character_coverage=1.0,
        minloglevel=2,
    )
    path = folder / "tokenizer.model"
    path.write_bytes(model.getvalue())
    backend = json.loads(GemmaTokenizer.from_pretrained(folder).backend_tokenizer.to_str())
    backend["added_tokens"] = [token for token in backend["added_tokens"] if token["content"] in (bos, eos, pad, "<unk>")]
    backend["post_processor"] = None
    if has_prefix:
        prepend, replace = {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        backend["normalizer"] = {"type": "Sequence", "normalizers": [prepend, replace]}
    return Tokenizer.from_str(json.dumps(backend))


def _make_byte_level() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary, merges = _read_gpt2_subset()
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@cache
def _read_gpt2_subset() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token ids and merges of GPT-2: its first 256 tokens, which are the bytes, and what the recognized text and our words are made of."""
    from gguf import GGUFReader
    from tokenizers import Tokenizer, models, pre_tokenizers

    fields = GGUFReader(GPT2_VOCABULARY).fields
    all_ids: dict[str, int] = {token: n for n, token in enumerate(fields["tokenizer.ggml.tokens"].contents())}
    all_merges: list[tuple[str, str]] = []
    for merge in fields["tokenizer.ggml.merges"].contents():
        left, right = merge.split(" ")
        all_merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab=all_ids, merges=all_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    parts = {left + right: (left, right) for left, right in all_merges}
    needed, pending = set[str](), [token for text in _list_known_texts() for token in tokenizer.encode(text).tokens]
    while pending:
        token = pending.pop()
        if token in parts and token not in needed:
            needed.add(token)
            pending += parts[token]
    ids = {token: n for token, n in all_ids.items() if n < 256 or token in needed}
    used = set(ids.values())
    ids |= {f"[unused{n}]": n for n in range(max(used)) if n not in used}
    return ids, [merge for merge in all_merges if "".join(merge) in needed]


def _list_known_texts() -> list[str]:
    """The text by which the converter recognizes a tokenizer, and the words of our tests, at the beginning of a text and behind a space."""
    source = (LLAMA_CPP_FOLDER / "conversion" / "base.py").read_text(encoding="utf-8")
    literals = re.findall(r"^ +chktxt = ('.*')$", source, re.MULTILINE)
    words = [*WORDS.split(), "system", "user", "assistant"]
    return [*map(ast.literal_eval, literals), *words, *(f" {word}" for word in words)]
