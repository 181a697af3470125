#!/usr/bin/env bash
# All that only a GPU can show, in one run of under 8 minutes: build, tests, sanitizers, benchmarks. `make gpu-check`.
# Needs a Python with CUDA torch, triton, cmake, ninja, pybind11 and pytest, and no network. Results are files in $OUT.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}
mkdir -p "$OUT"
summary="$OUT/gpu_check.md"
failed=0

"$PYTHON" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || {
  echo "gpu-check: $PYTHON sees no CUDA device; name another with PYTHON=..." >&2
  exit 1
}
capability=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')

# stage NAME SECONDS COMMAND...: runs it with a limit, keeps its output, adds a row to the summary.
stage() {
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  timeout -k 10 "$limit" "$@" >"$OUT/gpu_$name.log" 2>&1
  local status=$?
  [ $status -eq 0 ] || failed=1
  echo "| $name | $([ $status -eq 0 ] && echo passed || echo "failed ($status)") | $((SECONDS - start)) s | $(tail -n 1 "$OUT/gpu_$name.log" | cut -c1-120 | tr '|' '/') |" | tee -a "$summary"
}

{
  echo "GPU check, $(date -I): $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | head -n 1),"
  "$PYTHON" -c 'import torch, triton; print(f"PyTorch {torch.__version__}, Triton {triton.__version__}.")'
  printf '\n| stage | result | time | last line |\n|---|---|---|---|\n'
} >"$summary"

parallel=$("$PYTHON" -c 'import xdist' 2>/dev/null && echo "-n 8")
[ -x /usr/local/cuda/bin/nvcc ] && export CUDA_HOME=${CUDA_HOME:-/usr/local/cuda}
stage build 110 env TORCH_CUDA_ARCH_LIST="$capability" MLA_EXT_CUDA=on \
  "$PYTHON" -m pip install --no-build-isolation --no-deps --no-index -e .
stage info 20 "$PYTHON" -m mla_ext info
# shellcheck disable=SC2086
stage tests 120 "$PYTHON" -m pytest -q $parallel --ignore tests/test_packaging.py --ignore tests/test_cuda_compile.py \
  --ignore tests/test_cuda_emulation.py
for tool in memcheck racecheck; do
  if command -v compute-sanitizer >/dev/null; then
    stage "$tool" 45 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$PYTHON" -m pytest -q -x tests/test_ops.py -k "cuda-cuda and 33 and float32 and (momentum or before)"
  fi
done
stage head_step 60 "$PYTHON" -m benchmarks.speed.head_step --quick --device cuda --out "$OUT"
stage fusion 35 "$PYTHON" -m benchmarks.speed.fusion --quick --device cuda --out "$OUT"
stage training 25 "$PYTHON" -m benchmarks.speed.training --quick --device cuda --out "$OUT"
stage host_time 15 "$PYTHON" -m benchmarks.speed.host_time --out "$OUT"
cat "$summary"
exit $failed
