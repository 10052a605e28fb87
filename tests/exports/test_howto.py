"""What lies beside a GGUF file tells the truth about it."""

from pathlib import Path

import pytest

from jobs.errors import JobFailed
from jobs.exporters.howto import CONVERSATIONS, GEMMA_TEMPLATE, command_line, gemma_turns, modelfile, writes_gemma_turns


class Tokenizer:
    """As much of one as a chat template needs."""

    bos_token = "<bos>"

    def __init__(self, chat_template: str | None) -> None:
        self.chat_template = chat_template

    def apply_chat_template(self, messages: list[dict[str, str]], **_: object) -> str:
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> None:
            from jinja2 import TemplateError

            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = refuse
        template = environment.from_string(self.chat_template or "")
        return template.render(messages=messages, bos_token=self.bos_token, add_generation_prompt=True)


@pytest.fixture(scope="module")
def gemma() -> Tokenizer:
    """With the template that is trained when a base has none: Google's own."""
    from importlib.resources import files

    return Tokenizer((files("trl") / "chat_templates/gemma3.jinja").read_text())


def test_ollamas_turns_are_those_of_gemmas_own_template(gemma: Tokenizer) -> None:
    assert writes_gemma_turns(gemma)  # pyright: ignore[reportArgumentType]  # as much as is asked of it
    assert gemma_turns(CONVERSATIONS[2]) == "<start_of_turn>user\nBe brief.\n\nHello.<end_of_turn>\n<start_of_turn>model\n"
    told = modelfile("tuned-q8_0.gguf", gemma)  # pyright: ignore[reportArgumentType]
    assert told.startswith("# Beside tuned-q8_0.gguf: ollama create NAME -f THIS_FILE\nFROM ./tuned-q8_0.gguf\n")
    assert f'TEMPLATE """{GEMMA_TEMPLATE}"""\nPARAMETER stop "<end_of_turn>"\n' in told


@pytest.mark.parametrize(
    "template",
    [
        "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}",
        "{{ raise_exception('no system') if messages[0].role == 'system' }}",
    ],
)
def test_another_models_turns_are_left_to_the_file(template: str) -> None:
    other = Tokenizer(template)
    assert not writes_gemma_turns(other)  # pyright: ignore[reportArgumentType]
    assert "TEMPLATE" not in modelfile("x.gguf", other)  # pyright: ignore[reportArgumentType]


def test_a_model_without_turns_goes_on_with_what_it_is_given() -> None:
    assert 'TEMPLATE "{{ .Prompt }}"' in modelfile("x.gguf", Tokenizer(None))  # pyright: ignore[reportArgumentType]


def test_an_adapter_names_the_file_that_it_belongs_to(gemma: Tokenizer) -> None:
    told = modelfile("base.gguf", gemma, "tuned-lora-f16.gguf")  # pyright: ignore[reportArgumentType]
    assert "FROM ./base.gguf\nADAPTER ./tuned-lora-f16.gguf\n" in told


def test_a_command_that_does_not_work_is_written_nowhere(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(JobFailed, match=r"broken\.gguf does not answer in llama\.cpp's own program") as caught:
        command_line(tmp_path / "broken.gguf", "<bos>hello", "<bos>", threads=1)
    assert caught.value.failure.code == "export_failed"
