#!/usr/bin/env bash
# compute-sanitizer over small calls of every Triton kernel (sanitize_gpu.py). Needs a CUDA device and
# compute-sanitizer, of the CUDA toolkit, in PATH or in CUDA_HOME. PYTHON: the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
sanitizer=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
if [ ! -x "$sanitizer" ]; then
    echo "compute-sanitizer was found neither in PATH nor in CUDA_HOME" >&2
    exit 127
fi
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$(mktemp -d)}
${PYTHON:-python3} -m tests.sanitize_gpu # compiles, so that the sanitizer sees kernels alone
export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # each tensor an allocation of its own
for tool in memcheck racecheck initcheck; do
    echo "compute-sanitizer --tool $tool"
    "$sanitizer" --tool "$tool" --error-exitcode 1 ${PYTHON:-python3} -m tests.sanitize_gpu
done
