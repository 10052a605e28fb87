"""Answers questions with the base model, decoded greedily, in the chat template of the training. Run it in the trainer's environment.

Reads {"questions": [...], "max_tokens": n} from standard input and prints the answers as a JSON list.
"""

import argparse
import atexit
import json
import shutil
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from storage import ObjectStore, map_concurrently
from storage.file import LocalStore
from storage.registry import open_store

BASE_KEY = "pretrained_weights/huggingface/google/gemma-3-270m"


def main() -> None:
    """Load the base from the object store and answer the questions."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", required=True, help="the object store, as file:///… or gs://…")
    store = open_store(parser.parse_args().store)
    request = json.load(sys.stdin)
    folder = get_base_folder(store)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = tokenizer.chat_template or files("trl").joinpath("chat_templates/gemma3.jinja").read_text()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    answers = []
    for question in request["questions"]:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            output = model.generate(**prompt, max_new_tokens=request["max_tokens"], do_sample=False)
        answers.append(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    print(json.dumps(answers))


def get_base_folder(store: ObjectStore) -> Path:
    """The folder of the base: in a local store itself, otherwise a temporary copy."""
    if isinstance(store, LocalStore):
        return store.path_for_key(BASE_KEY)
    folder = Path(tempfile.mkdtemp(prefix="base-"))
    atexit.register(shutil.rmtree, folder)
    keys = [stored.key for stored in store.iter_objects(f"{BASE_KEY}/")]
    map_concurrently(lambda key: store.download(key, folder / key.removeprefix(f"{BASE_KEY}/")), keys)
    return folder


if __name__ == "__main__":
    main()
