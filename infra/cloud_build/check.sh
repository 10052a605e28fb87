#!/usr/bin/env bash
# The step `check` of cloudbuild.yaml: lint, types, unit and contract tests, in an image that has the Firestore emulator and Java.
set -euo pipefail

# Debian's Python is 3.11 too. The image does not guarantee make or Python.
apt-get -qq update
apt-get -qq install --yes --no-install-recommends make python3.11 python3.11-venv >/dev/null

exec make check test-fast
