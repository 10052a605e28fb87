#!/usr/bin/env bash
# Installs this environment into a virtual environment: jobs/environments/llm/install.sh PYTHON. `make setup-llm` calls it.
set -euo pipefail

main() {
  local python=$1 folder
  folder=$(dirname "${BASH_SOURCE[0]}")
  # torch first and alone: the versions of the other packages depend on it.
  install "$python" "$folder" torch
  install "$python" "$folder" -r "$folder/requirements.txt"
  infra/llama_cpp.sh "$python"
}

# Without compiling modules: a run imports a small part of the trainer's libraries.
install() {
  local python=$1 folder=$2
  shift 2
  "$python" -m pip install --quiet --disable-pip-version-check --no-compile -c "$folder/constraints.txt" "$@"
}

main "$@"
