#!/usr/bin/env bash
# The step `check` of cloudbuild.yaml: lint, types, unit and contract tests, in an image that brings the Firestore emulator and Java.
set -euo pipefail

# Debian's Python, which is 3.11 there too; the image promises neither of these.
apt-get -qq update
apt-get -qq install --yes --no-install-recommends make python3.11 python3.11-venv >/dev/null

exec make check test-fast
