"""The Modelfile and the run script written for a GGUF file."""

from pathlib import Path

import pytest

from jobs.llm.exporters.usage import (
    GEMMA_TEMPLATE,
    TEMPLATE_TEST_CONVERSATIONS,
    make_modelfile,
    render_gemma_turns,
    uses_gemma_template,
    verify_command,
)
from jobs.runtime.errors import JobFailed


class FakeTokenizer:
    """The part of a tokenizer that a chat template needs."""

    bos_token = "<bos>"

    def __init__(self, chat_template: str | None) -> None:
        self.chat_template = chat_template

    def apply_chat_template(self, messages: list[dict[str, str]], **_: object) -> str:
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def raise_exception(message: str) -> None:
            from jinja2 import TemplateError

            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = raise_exception
        template = environment.from_string(self.chat_template or "")
        return template.render(messages=messages, bos_token=self.bos_token, add_generation_prompt=True)


@pytest.fixture(scope="module")
def gemma() -> FakeTokenizer:
    """A tokenizer with Google's template, the one that training uses when a base has none."""
    from importlib.resources import files

    return FakeTokenizer((files("trl") / "chat_templates/gemma3.jinja").read_text())


def test_ollama_template_matches_gemma_template(gemma: FakeTokenizer) -> None:
    assert uses_gemma_template(gemma)  # pyright: ignore[reportArgumentType]  # a fake with the methods it uses
    assert (
        render_gemma_turns(TEMPLATE_TEST_CONVERSATIONS[2])
        == "<start_of_turn>user\nBe brief.\n\nHello.<end_of_turn>\n<start_of_turn>model\n"
    )
    modelfile = make_modelfile("tuned-q8_0.gguf", gemma)  # pyright: ignore[reportArgumentType]
    assert modelfile.startswith("# Put this file beside tuned-q8_0.gguf and run: ollama create NAME -f THIS_FILE\nFROM ./tuned-q8_0.gguf\n")
    assert f'TEMPLATE """{GEMMA_TEMPLATE}"""\nPARAMETER stop "<end_of_turn>"\n' in modelfile


@pytest.mark.parametrize(
    "template",
    [
        "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}",
        "{{ raise_exception('no system') if messages[0].role == 'system' }}",
    ],
)
def test_other_templates_are_left_to_the_gguf(template: str) -> None:
    other = FakeTokenizer(template)
    assert not uses_gemma_template(other)  # pyright: ignore[reportArgumentType]
    assert "TEMPLATE" not in make_modelfile("x.gguf", other)  # pyright: ignore[reportArgumentType]


def test_model_without_chat_template_passes_prompt_through() -> None:
    assert 'TEMPLATE "{{ .Prompt }}"' in make_modelfile("x.gguf", FakeTokenizer(None))  # pyright: ignore[reportArgumentType]


def test_adapter_modelfile_names_its_base_file(gemma: FakeTokenizer) -> None:
    modelfile = make_modelfile("base.gguf", gemma, "tuned-lora-f16.gguf")  # pyright: ignore[reportArgumentType]
    assert "FROM ./base.gguf\nADAPTER ./tuned-lora-f16.gguf\n" in modelfile


def test_failing_command_is_not_written(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(JobFailed, match=r"llama-completion failed to run broken\.gguf") as caught:
        verify_command(tmp_path / "broken.gguf", "<bos>hello", "<bos>", threads=1)
    assert caught.value.failure.code == "export_failed"
