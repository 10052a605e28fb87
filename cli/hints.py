"""Translates what the API advises, in terms of HTTP, into commands and options of the command line."""

import re

# Templates of routes, and what does the same here. A route that advice names must be listed.
COMMANDS = {
    "GET /docs": "docs/api.md",
    "GET /capabilities": "`tunesmith capabilities`",
    "GET /whoami": "`tunesmith whoami`",
    "GET /health": "`tunesmith doctor`",
    "GET /keys": "`tunesmith keys list`",
    "GET /models": "`tunesmith models list`",
    "GET /models/{}": "`tunesmith models show {}`",
    "GET /storage": "`tunesmith du`",
    "POST /datasets": "`tunesmith datasets upload FILE`",
    "POST /datasets/check": "`tunesmith datasets check FILE`",
    "POST /datasets/uploads": "`tunesmith datasets upload FILE`",
    "GET /datasets/{}/rows": "`tunesmith datasets rows {}`",
    "POST /datasets/{}/token_lengths": "`tunesmith datasets tokens {}`",
    "GET /datasets": "`tunesmith datasets list`",
    "GET /datasets/{}": "`tunesmith datasets show {}`",
    "DELETE /datasets/{}": "`tunesmith datasets delete {}`",
    "POST /train": "`tunesmith train`",
    "GET /jobs": "`tunesmith jobs`",
    "GET /jobs/{}": "`tunesmith show {}`",
    "DELETE /jobs/{}": "`tunesmith delete {}`",
    "GET /jobs/download/{}": "`tunesmith download {}`",
    "GET /jobs/{}/events": "`tunesmith show {}`",
    "GET /jobs/{}/logs": "`tunesmith logs {}`",
    "GET /jobs/{}/metrics": "`tunesmith show {}`",
    "GET /jobs/{}/checkpoints": "`tunesmith checkpoints {}`",
    "DELETE /jobs/{}/checkpoints": "`tunesmith prune`",
    "POST /jobs/{}/checkpoints/{}/export": "`tunesmith export {} {}`",
    "POST /jobs/{}/export": "`tunesmith export {}`",
    "POST /jobs/{}/clone": "`tunesmith clone {}`",
    "POST /jobs/{}/pause": "`tunesmith pause {}`",
    "POST /jobs/{}/resume": "`tunesmith resume {}`",
    "POST /jobs/{}/retry": "`tunesmith retry {}`",
    "POST /jobs/{}/cancel": "`tunesmith cancel {}`",
}
# Fields of a request that have an option, below training_config or beside it.
OPTIONS = {
    "processed_dataset_id": "--dataset",
    "project_id": "--project",
    "job_name": "--name",
    "hardware": "--hardware",
    "max_gpu_seconds": "--max-gpu-seconds",
    "max_cost_usd": "--max-cost-usd",
    "hf_token": "--hf-token",
    "metadata": "--metadata",
    "training_config.base_model_id": "--base",
    "training_config.method": "--method",
    "training_config.trainer_type": "--trainer",
    "training_config.hyperparameters.epochs": "--epochs",
    "training_config.hyperparameters.max_steps": "--max-steps",
    "training_config.hyperparameters.learning_rate": "--lr",
    "training_config.hyperparameters.batch_size": "--batch-size",
    "training_config.hyperparameters.max_seq_length": "--max-length",
    "training_config.hyperparameters.lora_rank": "--rank",
    "training_config.wandb_config.project": "--wandb-project",
    "training_config.wandb_config.api_key": "--wandb-api-key",
    "training_config.export_config.format": "--format",
    "training_config.export_config.gguf_quantization": "--gguf",
    "training_config.export_config.include_gguf": "--gguf",
    "training_config.export_config.gguf_imatrix": "--imatrix",
    "training_config.export_config.hf_private": "--hf-private",
    "training_config.export_config.merged_dtype": "--merged-dtype",
    "training_config.export_config.include_lora_gguf": "--lora-gguf",
    "training_config.export_config.hf_repo_id": "--to-hub",
    "secrets.wandb_api_key": "--wandb-api-key",
    "base_model_id": "--base",
    "max_seq_length": "--max-length",
    "format": "--file-format",
    "encoding": "--encoding",
    "delimiter": "--delimiter",
    "sheet": "--sheet",
    "text_unit": "--text-unit",
    "mapping": "--mapping",
    "on_invalid": "--drop-invalid",
    "eval_fraction": "--eval-fraction",
    "source_credentials": "--source-credentials",
}
# Advice that names a field with its value, and how the command line says the same. Each is for commands with that option.
PHRASES = (
    ("--drop-invalid", re.compile(r'(?:send )?on_invalid "drop"'), "--drop-invalid"),
    ("--mapping", re.compile(r"""(?<!--mapping ')(?P<mapping>\{"[^{}]*(?:\{[^{}]*\}[^{}]*)*\})"""), r"--mapping '\g<mapping>'"),
    ("--mapping", re.compile(r"(?:send )?(?:a|the) mapping(?: such as|:)? --mapping"), "--mapping"),
    ("--mapping", re.compile("with the same fields"), "with the same options"),
)

_ROUTE = re.compile(r"(?P<open>`?)\b(?P<method>GET|POST|PUT|PATCH|DELETE) (?P<path>/[^\s`,;()]*[^\s`,;:.()])(?P<close>`?)")
_COUNT_TOKENS = re.compile(r'POST /datasets/([\w{}]+)/token_lengths with \{"base_model_id": "([^"]+)"\}')
_FIELD_NAME = re.compile(r"(?<![\w.'\"])[a-z][a-z_.]*[a-z](?![\w.])")


def translate_hint(text: str, options: frozenset[str] = frozenset()) -> str:
    """Advice of the API, with commands for its routes, and the options of this command for its fields."""
    text = _COUNT_TOKENS.sub(_translate_token_lengths, text)
    for option, phrase, translated in PHRASES:
        if option in options:
            text = phrase.sub(translated, text)
    return _FIELD_NAME.sub(lambda match: _translate_field(match.group(), options), _ROUTE.sub(_translate_route, text))


def get_option(param: str | None, options: frozenset[str]) -> str | None:
    """The option that sets a field of a request, if the command with these options has one."""
    if param is None:
        return None
    option = OPTIONS.get(param) or OPTIONS.get(f"training_config.{param}") or OPTIONS.get(param.partition(".")[0])
    return option if option in options else None


def _translate_token_lengths(match: re.Match[str]) -> str:
    dataset_id = "ID" if "{" in match[1] else match[1]
    return f"`tunesmith datasets tokens {dataset_id} --base {match[2]}`"


def _translate_route(match: re.Match[str]) -> str:
    method, path = match["method"], match["path"]
    for template, command in COMMANDS.items():
        pattern = re.escape(template).replace(r"\{\}", "([^/]+)")
        if found := re.fullmatch(pattern, f"{method} {path}"):
            ids = ["ID" if "{" in each else each for each in found.groups()]
            return command.format(*ids)
    return match.group()


def _translate_field(name: str, options: frozenset[str]) -> str:
    """The option for a field that a sentence names by its path or, if it cannot be a word of English, by its last part."""
    if "_" not in name:
        return name
    for path, option in OPTIONS.items():
        if option in options and (path == name or path.endswith(f".{name}")):
            return option
    return name
