#!/usr/bin/env bash
# The CUDA kernels on a GPU: build, tests on the device, compute-sanitizer, then every table. Needs python3 with torch 2.11
# or later and pytest, and nvcc; whatever else is missing (compute-sanitizer, transformers, triton) is named and left out.
# Usage: benchmarks/gpu.sh [PART ...]     all parts by default, and later parts run although an earlier one failed:
#   build                compile for this machine's GPUs
#   test                 the CUDA ops' tests on the device       test-wgmma         the same with Hopper's own matmul
#   memcheck racecheck   compute-sanitizer on the small tests
#   operations           each op beside its peers                operations-wgmma   the same with Hopper's own matmul
#   step                 the whole training step in tokens/s
# What is printed goes to $OUT/gpu.txt too, the tables' numbers to $OUT/PART.json; $OUT is benchmarks/results if not set.
set -uo pipefail
cd "$(dirname "$0")/.."
parts=(build test operations step test-wgmma operations-wgmma memcheck racecheck)
[ $# -gt 0 ] || set -- "${parts[@]}"
for name in "$@"; do
  [[ " ${parts[*]} " == *" $name "* ]] || { echo "unknown part $name: choose from ${parts[*]}"; exit 2; }
done
python=${PYTHON:-python3}
out=${OUT:-benchmarks/results}
mkdir -p "$out"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=passive
pytest=("$python" -m pytest -q -p no:cacheprovider)
tests=("${pytest[@]}" tests/ops/test_cuda.py tests/ops/test_cuda_device.py)

sanitize() { # TOOL: the small tests, without torch's caching allocator, which would hide accesses out of bounds
  local found
  found=$(command -v compute-sanitizer || command -v "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer") || {
    echo "compute-sanitizer is not found: $1 was not run"
    return 0
  }
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$found" --tool "$1" --error-exitcode 9 --target-processes all "${pytest[@]}" tests/ops/test_cuda.py
}

run() { # PART
  echo "== $1"
  case $1 in
    build) "$python" -m qat.ops.build --cuda-arch native ;;
    test) "${tests[@]}" ;;
    test-wgmma) QAT_CUDA_WGMMA=1 "${tests[@]}" ;;
    memcheck | racecheck) sanitize "$1" ;;
    operations-wgmma) QAT_CUDA_WGMMA=1 "$python" -m benchmarks.gpu --parts operations --json "$out/$1.json" ;;
    operations | step) "$python" -m benchmarks.gpu --parts "$1" --json "$out/$1.json" ;;
  esac
}

everything() {
  local failed=() name
  nvidia-smi 2>&1 || echo "nvidia-smi is not found"
  "$python" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda, "GPU", torch.cuda.is_available())'
  for name in "$@"; do
    run "$name" || { failed+=("$name"); echo "== $name FAILED"; }
  done
  [ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}"; return 1; }
}

everything "$@" 2>&1 | tee "$out/gpu.txt"
