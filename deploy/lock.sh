#!/usr/bin/env bash
# Resolves pyproject.toml into requirements.lock and requirements-test.lock, with hashes, for Python 3.11-3.13 at once.
#   deploy/lock.sh UV       UV: the uv program to use; `make lock` installs one
# Left out are torch, pinned in requirements-torch.txt without hashes, and the CUDA libraries and Triton that its
# builds for GPUs pin by themselves: a CPU-only machine must not download them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
uv=$1
inputs=(pyproject.toml requirements-torch.txt requirements-build.in)
compile=("$uv" pip compile --quiet --universal --python-version 3.11 --no-annotate --no-emit-index-url
  --custom-compile-command 'make lock')
all=$(mktemp)
trap 'rm -f "$all"' EXIT

"${compile[@]}" --extra test "${inputs[@]}" --output-file "$all"
omit=()
for name in $(sed -nE 's/^(torch|triton|cuda-[a-z0-9-]+|nvidia-[a-z0-9-]+)==.*/\1/p' "$all"); do
  omit+=(--no-emit-package "$name")
done
# Both take their versions from the one resolution, so the test environment contains the serving one.
"${compile[@]}" --generate-hashes "${omit[@]}" --constraint "$all" "${inputs[@]}" --output-file requirements.lock
"${compile[@]}" --generate-hashes "${omit[@]}" --constraint "$all" --extra test "${inputs[@]}" \
  --output-file requirements-test.lock
