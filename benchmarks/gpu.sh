#!/usr/bin/env bash
# The CUDA kernels on a GPU: build, tests on the device, compute-sanitizer, then every table. Needs python3 with torch 2.11
# or later and pytest, and nvcc; whatever else is missing (compute-sanitizer, transformers, triton) is named and left out.
# Usage: benchmarks/gpu.sh [build|test|memcheck|racecheck|operations|step ...]     all parts by default
# Text and JSON go to $OUT, or else to benchmarks/results. The exit status is 1 if a part failed; later parts still run.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-benchmarks/results}
[ $# -gt 0 ] || set -- build test memcheck racecheck operations step
for name in "$@"; do
  case $name in
    build | test | memcheck | racecheck | operations | step) ;;
    *) echo "unknown part $name: choose from build, test, memcheck, racecheck, operations, step"; exit 2 ;;
  esac
done
mkdir -p "$out"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=passive
failed=()

part() { # NAME COMMAND...: run it, keep its output, remember a failure
  local name=$1
  shift
  echo "== $name: $*"
  "$@" 2>&1 | tee "$out/$name.txt" || { failed+=("$name"); echo "== $name FAILED"; }
}

sanitize() { # TOOL: the small tests, without torch's caching allocator, which would hide accesses out of bounds
  local found
  found=$(command -v compute-sanitizer || command -v "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer") || {
    echo "compute-sanitizer is not found: $1 was not run"
    return 0
  }
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$found" --tool "$1" --error-exitcode 9 --target-processes all \
    "$python" -m pytest -q tests/test_cuda.py -k small -p no:cacheprovider
}

nvidia-smi 2>&1 || echo "nvidia-smi is not found"
"$python" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda, "GPU", torch.cuda.is_available())'
for name in "$@"; do
  case $name in
    build) part build "$python" -m qat.ops.build --cuda-arch native ;;
    test) part test "$python" -m pytest -q tests/test_cuda.py -p no:cacheprovider ;;
    memcheck | racecheck) part "$name" sanitize "$name" ;;
    operations | step) part "$name" "$python" -m benchmarks.gpu --parts "$name" --json "$out/$name.json" ;;
  esac
done
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
