#!/usr/bin/env bash
# Installs llama.cpp into the trainer's environment: infra/llama_cpp.sh PYTHON
#
# It installs the bindings (llama_cpp) and, from the same source archive, the converters, which no wheel contains:
# <environment>/share/llama.cpp/{convert_hf_to_gguf.py,convert_lora_to_gguf.py,conversion/,gguf-py/}, and in bin/ there two of
# llama.cpp's own programs: llama-imatrix and llama-completion. The programs are linked with the libraries of the bindings' wheel,
# which takes seconds instead of another build.
# Wheel and programs are built once per machine and cached with the archive; a second run changes nothing.
set -euo pipefail

readonly VERSION=0.3.36
readonly SDIST_SHA256=832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e
readonly DISKCACHE=diskcache==5.6.3 # llama_cpp imports it; installed by name, because --no-deps keeps numpy at the version that torch needs
readonly SDIST=llama_cpp_python-$VERSION.tar.gz
readonly WHEELS=${XDG_CACHE_HOME:-$HOME/.cache}/tunesmith/wheels
# The last one is a real vocabulary, from which tests make tokenizers that the converter recognizes.
readonly CONVERTERS=(convert_hf_to_gguf.py convert_lora_to_gguf.py conversion gguf-py LICENSE models/ggml-vocab-gpt-2.gguf)
readonly PROGRAMS=(imatrix completion) # folders of llama.cpp's tools/; each program is called llama-NAME
readonly HEADERS=(common include ggml/include vendor)

# GGML_NATIVE=OFF: a native build may not run on another machine, and on a processor with AMX it crashes at the first
# quantized matrix. The other features are never used; without them the build takes half the time.
readonly BUILD_FLAGS="-DGGML_NATIVE=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF -DMTMD_BUILD=OFF -DLLAVA_BUILD=OFF"

main() {
  [[ $# -eq 1 && -x $1 ]] || fail "usage: infra/llama_cpp.sh PYTHON, the Python of the trainer's environment"
  python=$1
  share=$("$python" -c 'import sys; print(sys.prefix)')/share/llama.cpp
  if is_installed; then
    print_status "llama.cpp ($VERSION) is installed"
    return
  fi
  mkdir -p "$WHEELS" "$(dirname "$share")"
  scratch=$(mktemp -d "$WHEELS/.scratch-XXXXXX") # in the same file system, so that a finished file is moved atomically
  trap 'rm -rf "$scratch"' EXIT
  [[ -f $WHEELS/$SDIST ]] || timed "downloading $SDIST (77 MB)" download_sdist
  check_sdist
  [[ -n $(cached_wheel) ]] || timed "building llama.cpp for this machine, once (3 minutes on 2 idle cores)" build_wheel
  timed "installing $(basename "$(cached_wheel)")" install_wheel
  ! supports_programs || [[ -d $(cached_programs) ]] || timed "building llama.cpp's programs (20 seconds)" build_programs
  timed "unpacking the converters into $share" unpack_converters
}

is_installed() {
  [[ -f $share/.sdist-sha256 && $(<"$share/.sdist-sha256") == "$SDIST_SHA256" ]] || return 1
  [[ -f $share/${CONVERTERS[-1]} ]] || return 1
  ! supports_programs || [[ -x $share/bin/llama-imatrix && -x $share/bin/llama-completion ]] || return 1
  "$python" - "$VERSION" <<'PYTHON'
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

try:
    raise SystemExit(version("llama-cpp-python") != sys.argv[1] or find_spec("diskcache") is None)
except PackageNotFoundError:
    raise SystemExit(1) from None
PYTHON
}

# pip also reads the archive's metadata, but compiles nothing.
download_sdist() {
  quiet "$python" -m pip download --disable-pip-version-check --no-deps --no-binary llama-cpp-python \
    "llama-cpp-python==$VERSION" -d "$scratch"
  mv "$scratch/$SDIST" "$WHEELS/$SDIST"
}

check_sdist() {
  local digest
  digest=$("$python" -c 'import hashlib, sys; print(hashlib.file_digest(open(sys.argv[1], "rb"), "sha256").hexdigest())' "$WHEELS/$SDIST")
  [[ $digest == "$SDIST_SHA256" ]] || fail "$WHEELS/$SDIST has sha256 $digest, expected $SDIST_SHA256; remove it and run again"
}

cached_wheel() {
  find "$WHEELS" -maxdepth 1 -name "llama_cpp_python-$VERSION-*_$(uname -m).whl" | sort | head -n 1
}

build_wheel() {
  command -v "${CXX:-c++}" >/dev/null || fail "llama.cpp needs a C++ compiler; install g++ or clang, or set CXX"
  CMAKE_ARGS=$BUILD_FLAGS CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$("$python" -c 'import os; print(os.cpu_count())')} \
    quiet "$python" -m pip wheel --disable-pip-version-check --no-deps "$WHEELS/$SDIST" -w "$scratch"
  mv "$scratch"/llama_cpp_python-"$VERSION"-*.whl "$WHEELS/"
}

install_wheel() {
  quiet "$python" -m pip install --disable-pip-version-check --no-deps --force-reinstall "$(cached_wheel)"
  "$python" -c 'import diskcache' 2>/dev/null || quiet "$python" -m pip install --disable-pip-version-check --no-deps "$DISKCACHE"
  "$python" -c 'import llama_cpp' || fail "llama.cpp was built but does not load; remove $(cached_wheel) and run again"
}

# The linker options are those of Linux; on other systems jobs run without the programs.
supports_programs() {
  [[ $(uname -s) == Linux ]]
}

# The programs find the libraries by a relative path, which contains the version of Python.
cached_programs() {
  echo "$WHEELS/llama_cpp_programs-$VERSION-$("$python" -c 'import sysconfig; print(sysconfig.get_python_version())')-$(uname -s)_$(uname -m)"
}

# The wheel has llama.cpp's common library in lib/ at its top level, and the others in the package.
build_programs() {
  local inside=${SDIST%.tar.gz}/vendor/llama.cpp source=$scratch/source packages relative name
  packages=$("$python" -c 'import llama_cpp, pathlib; print(pathlib.Path(llama_cpp.__file__).parent.parent)')
  relative=$("$python" -c 'import os, sys; print(os.path.relpath(sys.argv[1], sys.argv[2]))' "$packages" "$share/bin")
  mkdir "$source" "$scratch/programs"
  tar -xzf "$WHEELS/$SDIST" -C "$source" --strip-components=3 "${HEADERS[@]/#/$inside/}" "${PROGRAMS[@]/#/$inside/tools/}"
  for name in "${PROGRAMS[@]}"; do
    # --disable-new-dtags: unlike a runpath, an rpath also applies to the libraries' own dependencies.
    quiet "${CXX:-c++}" -std=c++17 -O2 -DNDEBUG -w "${HEADERS[@]/#/-I$source/}" -I"$source/tools/$name" "$source/tools/$name"/*.cpp \
      -o "$scratch/programs/llama-$name" -L"$packages/lib" -L"$packages/llama_cpp/lib" -lllama-common -lllama -lggml -lggml-base -pthread \
      -Wl,--disable-new-dtags "-Wl,-rpath-link,$packages/llama_cpp/lib" "-Wl,-rpath,\$ORIGIN/$relative/lib" "-Wl,-rpath,\$ORIGIN/$relative/llama_cpp/lib"
  done
  mv "$scratch/programs" "$(cached_programs)"
}

unpack_converters() {
  local inside=${SDIST%.tar.gz}/vendor/llama.cpp
  mkdir "$scratch/converters"
  tar -xzf "$WHEELS/$SDIST" -C "$scratch/converters" --strip-components=3 "${CONVERTERS[@]/#/$inside/}"
  ! supports_programs || cp -R "$(cached_programs)" "$scratch/converters/bin"
  rm -rf "$share"
  mv "$scratch/converters" "$share"
  ! supports_programs || check_programs
  echo "$SDIST_SHA256" >"$share/.sdist-sha256" # last: without it the next run starts over
}

check_programs() {
  local name
  for name in "${PROGRAMS[@]}"; do
    "$share/bin/llama-$name" --version >/dev/null 2>&1 || fail "llama-$name was built but does not run; remove $(cached_programs) and run again"
  done
}

# Runs a command; prints its output only if it fails.
quiet() {
  "$@" >"$scratch/log" 2>&1 || {
    tail -n 40 "$scratch/log" >&2
    fail "this command failed, see above: $*"
  }
}

timed() {
  local activity=$1 started_at=$SECONDS
  shift
  print_status "$activity …"
  "$@"
  print_status "  done in $((SECONDS - started_at)) s"
}

print_status() { echo "$*"; }

fail() {
  echo "error: $*" >&2
  exit 1
}

main "$@"
