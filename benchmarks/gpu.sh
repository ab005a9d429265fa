#!/usr/bin/env bash
# The CUDA kernels on a GPU: build, tests on the device, compute-sanitizer, then every table. Needs python3 with torch 2.11
# or later and pytest, and nvcc; whatever else is missing (compute-sanitizer, transformers, triton) is named and left out.
# Usage: benchmarks/gpu.sh [PART ...]     all parts by default, and later parts run although an earlier one failed:
#   build                compile for this machine's GPUs, and the CPU's library, where the autograd node lies
#   test                 the CUDA ops' tests on the device       test-wgmma         the same with Hopper's own matmul
#   operations           results beside the reference's, a chain of launches, then each op beside its peers
#   operations-wgmma     what Hopper's own matmul changes of it
#   step                 the whole training step in tokens/s, eager and captured
#   memcheck racecheck   compute-sanitizer on the small tests
#   compiled             peers, and steps, that torch compiles first
# Each part has a limit in seconds (below), and all together QAT_GPU_SECONDS, 840 if not set: what a GPU for 15 minutes leaves. What
# does not fit is named. The tables' rows are written after each of their sections.
# What is printed goes to $OUT/gpu.txt too, the tables' numbers to $OUT/PART.json; $OUT is benchmarks/results if not set.
set -uo pipefail
cd "$(dirname "$0")/.."
declare -A limit=([build]=120 [test]=120 [operations]=290 [step]=150 [test-wgmma]=60 [operations-wgmma]=130 [memcheck]=90
  [compiled]=540 [racecheck]=120)
parts=(build test operations step test-wgmma operations-wgmma memcheck compiled racecheck)
total=${QAT_GPU_SECONDS:-840}
[ $# -gt 0 ] || set -- "${parts[@]}"
for name in "$@"; do
  [[ " ${parts[*]} " == *" $name "* ]] || { echo "unknown part $name: choose from ${parts[*]}"; exit 2; }
done
python=${PYTHON:-python3}
out=${OUT:-benchmarks/results}
mkdir -p "$out"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=passive
pytest=("$python" -m pytest -q -p no:cacheprovider)
tests=("${pytest[@]}" tests/ops/test_cuda.py tests/ops/test_fused_cuda.py tests/ops/test_cuda_device.py
  tests/training/test_waiting_on_a_gpu.py -k "not fullgraph")

sanitize() { # TOOL: the small tests, without torch's caching allocator, which would hide accesses out of bounds
  local found
  found=$(command -v compute-sanitizer || command -v "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer") || {
    echo "compute-sanitizer is not found: $1 was not run"
    return 0
  }
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 limited "$found" --tool "$1" --error-exitcode 9 --target-processes all "${pytest[@]}" tests/ops/test_cuda.py
}

limited() { # COMMAND ...: within what the part and all of them have left
  local left=$((total - SECONDS))
  timeout --kill-after=5 "$((left < limit[$part] ? left : limit[$part]))" "$@"
}

tables() { # ARGUMENT ...
  limited "$python" -m benchmarks.gpu "$@" --json "$out/$part.json"
}

run() { # the part
  case $part in
    build) limited "$python" -m qat.ops.build && limited "$python" -m qat.ops.build --cuda-arch native ;;
    test) limited "${tests[@]}" ;;
    test-wgmma) QAT_CUDA_WGMMA=1 limited "${tests[@]}" ;;
    memcheck | racecheck) sanitize "$part" ;;
    operations-wgmma) QAT_CUDA_WGMMA=1 tables --parts operations --sections reference prefill training ;;
    operations | step | compiled) tables --parts "$part" ;;
  esac
}

everything() {
  local failed=() part
  nvidia-smi 2>&1 || echo "nvidia-smi is not found"
  "$python" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda, "GPU", torch.cuda.is_available())'
  for part in "$@"; do
    [ $((total - SECONDS)) -gt 5 ] || { echo "== $part is left out: the time is over"; continue; }
    echo "== $part, at $SECONDS s"
    run || { failed+=("$part"); echo "== $part FAILED, or was ended at its limit"; }
  done
  [ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}"; return 1; }
}

everything "$@" 2>&1 | tee "$out/gpu.txt"
