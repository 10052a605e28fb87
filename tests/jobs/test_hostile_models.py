"""Base models made by an attacker: code in configs, pickles, damaged weights, links, oversize files, and chat templates that never end."""

import json
import os
import pickle
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.llm.base_files import MAX_BYTES, copy_base_files
from jobs.llm.chat_format import read_template
from jobs.llm.chat_templates import MAX_TEMPLATE_CHARACTERS, check_chat_template
from jobs.llm.data.turns import sample_rows
from jobs.llm.exporters.model_files import copy_files, copy_tokenizer
from jobs.llm.exporters.staging import make_staging_folder
from jobs.llm.llama_cpp.runner import convert, convert_lora
from jobs.llm.model import load_adapter
from jobs.llm.training_context import load_tokenizer
from jobs.runtime.errors import JobFailed
from jobs.runtime.subprocesses import SubprocessFailed, run_program
from schema.training import TRAINING_CONFIG
from tests.jobs.conftest import EventRecorder, load_trainer, make_context, make_row_tokenizer, make_spec

# Python that leaves a trace wherever it is executed: by an import, or by the class that a config names.
CANARY_CODE = """
import json, os
with open({canary!r}, "a") as file:
    file.write(json.dumps(dict(os.environ)))

class Tokenizer:
    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        return cls()

Config = Model = Processor = Tokenizer
"""
AUTO_MAP = {
    "AutoConfig": "attack.Config",
    "AutoModelForCausalLM": "attack.Model",
    "AutoModel": "attack.Model",
    "AutoTokenizer": ["attack.Tokenizer", "attack.Tokenizer"],
    "AutoProcessor": "attack.Processor",
}
STORE_PREFIX = "pretrained_weights/huggingface"


class RunsWhenUnpickled:
    """A pickle of it runs code when it is loaded."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._canary),)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """A path that exists only if code of a model was executed."""
    return tmp_path / "canary"


@pytest.fixture
def make_base(base: Path, canary: Path, tmp_path: Path) -> Callable[..., Path]:
    """Copies the tiny base into a store, with code in every config that may name code; returns its folder."""

    def make(name: str = "hostile/model", source: Path = base, **tokenizer_settings: Any) -> Path:
        folder = tmp_path / "objects" / STORE_PREFIX / name
        shutil.copytree(source, folder)
        (folder / "attack.py").write_text(CANARY_CODE.format(canary=str(canary)))
        for config in ("config.json", "tokenizer_config.json", "generation_config.json"):
            update_json(folder / config, auto_map=AUTO_MAP)
        update_json(folder / "config.json", custom_pipelines={"text-generation": {"impl": "attack.Model"}})
        update_json(folder / "tokenizer_config.json", **tokenizer_settings)
        return folder

    return make


def update_json(path: Path, **settings: Any) -> None:
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(content | settings))


@pytest.fixture
def glm_base(tokenizer: Any, tmp_path: Path) -> Path:
    """A tiny Glm4, whose tokenizer llama.cpp's converter loads with `trust_remote_code=True`."""
    import torch
    from transformers import Glm4Config, Glm4ForCausalLM

    torch.manual_seed(3)
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
    folder = tmp_path / "glm"
    Glm4ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# --- code in configs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("through_staging", [True, False])
def test_gguf_converter_runs_no_code_of_the_model(
    make_base: Callable[..., Path], glm_base: Path, canary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, through_staging: bool
) -> None:
    monkeypatch.setenv("JOB_TOKEN", "t0ken")
    folder = make_base(source=glm_base)
    if through_staging:
        folder = make_staging_folder(folder, folder, [folder], tmp_path / "staging")
        assert "auto_map" not in "".join(path.read_text() for path in folder.glob("*config.json"))
    with pytest.raises(SubprocessFailed, match="pre-tokenizer was not recognized"):  # so it loaded the tokenizer, with the library's class
        convert(folder, tmp_path / "model.gguf", precision="f32", name="model")
    assert not canary.exists()


def test_lora_converter_runs_no_code_of_the_base(make_base: Callable[..., Path], glm_base: Path, canary: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base, adapter = make_base(source=glm_base), tmp_path / "adapter"
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(glm_base), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(adapter)
    convert_lora(adapter, base, tmp_path / "adapter.gguf")
    assert (tmp_path / "adapter.gguf").stat().st_size > 0
    assert not canary.exists()


def test_training_on_a_base_with_code_uses_the_library_class(make_base: Callable[..., Path], canary: Path, tmp_path: Path) -> None:
    folder = make_base()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(RunsWhenUnpickled(canary)))
    (folder / "training_args.bin").write_bytes(pickle.dumps(RunsWhenUnpickled(canary)))
    spec = make_spec(tmp_path / "objects", base_model_id="hostile/model", hyperparameters={"max_steps": 1})
    context = make_context(spec, tmp_path / "work", EventRecorder())
    trained = load_trainer(spec)(spec.training_config, context)
    assert not canary.exists()
    used = {path.name for path in trained.base_folder.iterdir()}
    assert used & {"attack.py", "pytorch_model.bin", "training_args.bin"} == set()
    for path in [*trained.base_folder.glob("*config.json"), *trained.folder.glob("*config.json")]:
        assert "attack." not in path.read_text()


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json", "processor_config.json"])
def test_configs_are_copied_without_what_names_code(make_base: Callable[..., Path], tmp_path: Path, name: str) -> None:
    folder = make_base()
    update_json(folder / name, auto_map=AUTO_MAP, text_config={"auto_map": AUTO_MAP, "attn_implementation": "attacker/kernel"}, kept=1)
    copy_files(folder, tmp_path / "copied", [name])
    copy_tokenizer(folder, tmp_path / "copied")
    for copied in (tmp_path / "copied" / name, copy_base_files(folder, tmp_path / "used", "model m") / name):
        content = json.loads(copied.read_text())
        assert (content["kept"], content["text_config"]) == (1, {})
        assert "auto_map" not in content
    assert "auto_map" in (folder / name).read_text()  # the original is not changed through a link


def test_tokenizer_cannot_name_files_elsewhere(make_base: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_base(vocab_file="/etc/passwd", tokenizer_file="/etc/passwd", name_or_path="/etc")
    used = copy_base_files(folder, tmp_path / "used", "model m")
    assert "/etc" not in (used / "tokenizer_config.json").read_text()


def test_base_that_needs_its_own_code_is_refused(make_base: Callable[..., Path], canary: Path, tmp_path: Path) -> None:
    folder = make_base()
    update_json(folder / "config.json", model_type="attackers-own")
    with pytest.raises(JobFailed, match="needs code of its own repository, which is never run") as failed:
        copy_base_files(folder, tmp_path / "used", "base model hostile/model")
    assert failed.value.failure.code == "invalid_config"
    assert not canary.exists()


def test_tokenizer_that_needs_its_own_code_is_refused(make_base: Callable[..., Path], canary: Path, tmp_path: Path) -> None:
    folder = make_base(tokenizer_class="AttackTokenizer")
    for name in ("tokenizer.json", "tokenizer.model"):
        (folder / name).unlink()
    used = copy_base_files(folder, tmp_path / "used", "base model hostile/model")
    with pytest.raises(JobFailed, match="the tokenizer of base model hostile/model cannot be loaded"):
        load_tokenizer(used, "hostile/model")
    assert not canary.exists()


def test_child_processes_get_no_secret_and_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("JOB_TOKEN", "HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "GOOGLE_APPLICATION_CREDENTIALS", "SOME_PASSWORD"):
        monkeypatch.setenv(name, "s3cret")
    monkeypatch.setenv("JOB_WORKDIR", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    output = tmp_path / "environment"
    code = f"import json, os, pathlib; pathlib.Path({str(output)!r}).write_text(json.dumps(dict(os.environ)))"
    run_program("child", [sys.executable, "-c", code], cwd=tmp_path)
    environment = json.loads(output.read_text())
    assert "s3cret" not in environment.values()
    assert environment.items() >= {"HF_HUB_OFFLINE": "1", "HOME": str(tmp_path), "OMP_NUM_THREADS": "3"}.items()


def test_child_process_cannot_reach_the_service(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    import socket

    caplog.set_level("INFO", "jobs.runtime.subprocesses")
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 5)"
        try:
            run_program("child", [sys.executable, "-c", code])
        except SubprocessFailed as error:
            assert "Network is unreachable" in str(error)  # the system decides which of the two happens
            assert caplog.records[0].__dict__["network"] == "none"
        else:
            assert caplog.records[0].__dict__["network"] == "inherited"


# --- weights and other files ---------------------------------------------------------------------------------------------


def test_pickle_beside_dummy_safetensors_is_never_opened(base: Path, canary: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = tmp_path / "objects" / STORE_PREFIX / "hostile/model"
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file({}, folder / "dummy.safetensors")
    for name in ("pytorch_model.bin", "model.pt", "optimizer.pth", "weights.pkl"):
        (folder / name).write_bytes(pickle.dumps(RunsWhenUnpickled(canary)))
    spec = make_spec(tmp_path / "objects", base_model_id="hostile/model", hyperparameters={"max_steps": 1})
    with pytest.raises(JobFailed) as failed:
        load_trainer(spec)(spec.training_config, make_context(spec, tmp_path / "work", EventRecorder()))
    assert failed.value.failure.code == "invalid_config"
    assert not canary.exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_pickle_in_a_checkpoint_is_refused(canary: Path, tmp_path: Path, name: str) -> None:
    import torch
    from transformers import Trainer, TrainingArguments

    trainer: Any = Trainer(torch.nn.Linear(2, 2), TrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True, report_to=[]))
    trainer.create_optimizer_and_scheduler(1)
    torch.save(trainer.optimizer.state_dict(), tmp_path / "optimizer.pt")
    torch.save(trainer.lr_scheduler.state_dict(), tmp_path / "scheduler.pt")
    (tmp_path / name).write_bytes(pickle.dumps(RunsWhenUnpickled(canary)))
    load = trainer._load_rng_state if name == "rng_state.pth" else trainer._load_optimizer_and_scheduler
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        load(str(tmp_path))
    assert not canary.exists()


def test_adapter_checkpoint_without_safetensors_is_refused(canary: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(RunsWhenUnpickled(canary)))
    with pytest.raises(JobFailed, match=r"no adapter_model\.safetensors"):
        load_adapter(None, tmp_path)
    assert not canary.exists()


def make_nested_json(folder: Path) -> None:
    (folder / "config.json").write_text('{"a": ' * 100_000 + "1" + "}" * 100_000)


def make_large_config(folder: Path) -> None:
    with (folder / "config.json").open("a") as file:
        file.write(" " * MAX_BYTES["config.json"])


def make_large_tokenizer(folder: Path) -> None:
    os.truncate(folder / "tokenizer.json", MAX_BYTES["tokenizer.json"] + 1)  # sparse


def make_link_to_secret(folder: Path) -> None:
    (folder / "LICENSE").symlink_to("/etc/hostname")


def make_linked_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to("../elsewhere.safetensors")


def make_loop_of_links(folder: Path) -> None:
    (folder / "merges.txt").symlink_to("merges.txt")


def make_folder_for_file(folder: Path) -> None:
    (folder / "vocab.json").mkdir()


def make_pipe(folder: Path) -> None:
    os.mkfifo(folder / "README.md")


def make_weights_of_odd_name(folder: Path) -> None:
    (folder / "a\n\x1b[2J;rm -rf.safetensors").write_bytes(b"")


def make_traversing_index(folder: Path) -> None:
    update_json(folder / "model.safetensors.index.json", weight_map={"a": "../../other/model.safetensors"})


def make_pickled_index(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    update_json(folder / "model.safetensors.index.json", weight_map={"a": "pytorch_model.bin"})


def make_huge_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((1 << 62).to_bytes(8, "little") + b"{}")


def make_nested_header(folder: Path) -> None:
    header = b'{"a":' * 100_000
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)


def make_header_beyond_the_file(folder: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)


def make_array_config(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def make_huge_number(folder: Path) -> None:
    (folder / "config.json").write_text('{"hidden_size": ' + "9" * 10_000 + "}")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (make_nested_json, "config.json that is not valid JSON, or is nested too deeply"),
        (make_large_config, "the limit is"),
        (make_large_tokenizer, "the limit is"),
        (make_link_to_secret, "a link that leaves its folder: LICENSE"),
        (make_linked_weights, "a link that leaves its folder: model.safetensors"),
        (make_loop_of_links, "no regular file at merges.txt"),
        (make_folder_for_file, "no regular file at vocab.json"),
        (make_pipe, "no regular file at README.md"),
        (make_weights_of_odd_name, "unusual name"),
        (make_traversing_index, "weights elsewhere"),
        (make_pickled_index, "weights elsewhere"),
        (make_huge_header, "its header does not fit"),
        (make_nested_header, "its header is not JSON"),
        (make_header_beyond_the_file, "bytes that the file does not have"),
        (make_array_config, "not a JSON object"),
        (make_huge_number, "not valid JSON"),
    ],
)
def test_hostile_files_are_refused(make_base: Callable[..., Path], tmp_path: Path, damage: Callable[[Path], None], reason: str) -> None:
    folder = make_base()
    damage(folder)
    with pytest.raises(JobFailed, match=reason) as failed:
        copy_base_files(folder, tmp_path / "used", "base model hostile/model")
    assert failed.value.failure.code == "invalid_config"
    assert "base model hostile/model" in failed.value.failure.message
    assert "\x1b" not in failed.value.failure.message


@pytest.mark.parametrize("damage", [make_link_to_secret, make_weights_of_odd_name, make_nested_json, make_huge_header])
def test_training_on_hostile_files_fails_before_they_are_read(
    make_base: Callable[..., Path], tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    damage(make_base())
    spec = make_spec(tmp_path / "objects", base_model_id="hostile/model", hyperparameters={"max_steps": 1})
    with pytest.raises(JobFailed, match="base model"):
        load_trainer(spec)(spec.training_config, make_context(spec, tmp_path / "work", EventRecorder()))


def test_files_without_a_use_are_not_copied(make_base: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_base()
    for name in ("adapter_config.json", "requirements.txt", "custom_generate.py", ".bashrc", "modeling.py"):
        (folder / name).write_text("{}")
    (folder / "custom_generate").mkdir()
    names = {path.name for path in copy_base_files(folder, tmp_path / "used", "model m").iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    }


# --- chat templates ------------------------------------------------------------------------------------------------------

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"
BOMBS = {
    "nested loops": ENDLESS,
    "repeated text": "{% set x = 'x' * 10**9 %}{{ x }}{{ x }}{{ x }}",
    "constant folding": "{{ 'x' * 10**10 }}",
    "large power": "{{ 9 ** (9 ** 9) }}",
    "growing namespace": "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "growing list": "{% set n = namespace(l=[1]) %}{% for i in range(60) %}{% set n.l = n.l + n.l %}{% endfor %}",
    "long output": "{% for i in range(2000) %}{{ 'xxxxxxxxxx' * 1000 }}{% endfor %}",
    "exponential macro": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "padding": "{{ '%1000000000d' | format(1) }}{{ 'x' | center(3000000000) }}",
    "for one word of the rows": "{% if 'bomb' in messages[0].content %}" + ENDLESS + "{% endif %}",
    "large template": "{{ bos_token }}" + "x" * MAX_TEMPLATE_CHARACTERS,
}


def check_template(tokenizer: Any, folder: Path, *splits: Path, requested: str | None = None) -> None:
    """Check the tokenizer's template, or one that a request has."""
    config = TRAINING_CONFIG.validate_python({"base_model_id": "hostile/model", "chat_template": requested})
    sample = sample_rows(splits, "messages", is_raw=False)
    check_chat_template(read_template(tokenizer, requested), tokenizer, config, sample, folder)


@pytest.mark.parametrize("name", BOMBS)
def test_template_bombs_are_refused_in_time(tokenizer: Any, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import copy

    import psutil

    monkeypatch.setattr("jobs.llm.chat_templates.TIMEOUT_S", 4.0)
    rows = tmp_path / "train.jsonl"
    rows.write_text(json.dumps({"messages": [{"role": "user", "content": "a bomb"}, {"role": "assistant", "content": "x"}]}) + "\n")
    hostile = copy.deepcopy(tokenizer)
    hostile.chat_template = BOMBS[name]
    started, memory_bytes = time.monotonic(), psutil.Process().memory_info().rss
    with pytest.raises(JobFailed, match="the chat template of base model hostile/model") as failed:
        check_template(hostile, tmp_path, rows)
    assert failed.value.failure.code == "invalid_config"
    assert time.monotonic() - started < 15
    assert psutil.Process().memory_info().rss - memory_bytes < 200 << 20
    assert not psutil.Process().children()


def test_template_bomb_of_a_request_is_refused(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.llm.chat_templates.TIMEOUT_S", 4.0)
    with pytest.raises(JobFailed, match=r"training_config\.chat_template cannot be rendered within its limits"):
        check_template(tokenizer, tmp_path, requested=BOMBS["nested loops"])


def test_template_cannot_leave_the_sandbox(tokenizer: Any, canary: Path, tmp_path: Path) -> None:
    import copy

    hostile = copy.deepcopy(tokenizer)
    hostile.chat_template = f"{{{{ cycler.__init__.__globals__.os.mkdir({str(canary)!r}) }}}}"
    check_template(hostile, tmp_path)
    with pytest.raises(JobFailed, match="rejects the roles user"):
        make_row_tokenizer(hostile).tokenize({"messages": [{"role": "user", "content": "x"}]}, "messages")
    assert not canary.exists()


def test_training_on_a_base_with_a_template_bomb_fails_early(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.llm.chat_templates.TIMEOUT_S", 4.0)
    folder = tmp_path / "objects" / STORE_PREFIX / "hostile/model"
    shutil.copytree(base, folder)
    (folder / "chat_template.jinja").write_text(BOMBS["nested loops"])
    spec = make_spec(tmp_path / "objects", base_model_id="hostile/model", hyperparameters={"max_steps": 1})
    with pytest.raises(JobFailed, match="cannot be rendered within its limits"):
        load_trainer(spec)(spec.training_config, make_context(spec, tmp_path / "work", EventRecorder()))


def test_ordinary_template_of_the_base_is_accepted(tokenizer: Any, tmp_path: Path) -> None:
    check_template(tokenizer, tmp_path)
