#!/usr/bin/env bash
# All that only a GPU can show, in one run of under 8 minutes: build, tests, sanitizers, benchmarks. `make gpu-check`.
# Needs a Python with CUDA torch, triton, cmake, ninja, pybind11 and pytest, and no network. Results are files in $OUT.
# DEVICE=emulated is a dry run without a GPU: the kernels' sources on the emulated device, the benchmarks on the CPU.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-cuda}
[ "$DEVICE" = emulated ] && OUT=${OUT:-build/gpu_check}
OUT=${OUT:-benchmarks/results}
mkdir -p "$OUT"
summary="$OUT/gpu_check.md"
failed=0

if [ "$DEVICE" = cuda ]; then
  "$PYTHON" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || {
    echo "gpu-check: $PYTHON sees no CUDA device; name another with PYTHON=..., or make a dry run with DEVICE=emulated" >&2
    exit 1
  }
  capability=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
fi

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
  if [ "$DEVICE" = cuda ]; then
    echo "GPU check, $(date -I): $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | head -n 1),"
    "$PYTHON" -c 'import torch, triton; print(f"PyTorch {torch.__version__}, Triton {triton.__version__}.")'
  else
    echo "Dry run of the GPU check, $(date -I): the emulated device. No GPU is behind this table."
  fi
  printf '\n| stage | result | time | last line |\n|---|---|---|---|\n'
} >"$summary"

parallel=$("$PYTHON" -c 'import xdist' 2>/dev/null && echo "-n 8")
if [ "$DEVICE" = cuda ]; then
  [ -x /usr/local/cuda/bin/nvcc ] && export CUDA_HOME=${CUDA_HOME:-/usr/local/cuda}
  stage build 90 env TORCH_CUDA_ARCH_LIST="$capability" MLA_EXT_CUDA=on \
    "$PYTHON" -m pip install --no-build-isolation --no-deps --no-index -e .
  stage info 10 "$PYTHON" -m mla_ext info
  # shellcheck disable=SC2086
  stage tests 110 "$PYTHON" -m pytest -q $parallel --ignore tests/test_packaging.py --ignore tests/test_cuda_compile.py \
    --ignore tests/test_cuda_emulation.py --ignore tests/test_cuda_rank.py --ignore tests/test_recorder.py
  # Importing torch alone takes a minute under a sanitizer. racecheck sees shared memory only.
  for tool in memcheck racecheck; do
    if command -v compute-sanitizer >/dev/null; then
      stage "$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 9 \
        "$PYTHON" -m pytest -q -x tests/gpu/test_shapes.py -k "cuda and float32 and ((dense and small) or (rank and odd))"
    fi
  done
  benchmarks=cuda
else
  export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}  # nothing is installed
  stage build 200 "$PYTHON" tests/cuda_emulation/emulated.py "$OUT"
  stage info 30 "$PYTHON" -m mla_ext info
  stage tests 200 env MLA_EXT_EMULATED="$OUT/fast/driver" "$PYTHON" -m pytest -q tests/gpu
  stage memcheck 120 env MLA_EXT_EMULATED="$OUT/sanitized/driver" "$PYTHON" -m pytest -q tests/gpu -k "float32"
  stage racecheck 120 env MLA_EXT_EMULATED="$OUT/recorded/driver" "$PYTHON" -m pytest -q tests/gpu -k "float32"
  benchmarks=cpu
fi
stage step 35 "$PYTHON" -m benchmarks.speed.step --quick --device $benchmarks --out "$OUT"
stage head_step 45 "$PYTHON" -m benchmarks.speed.head_step --quick --device $benchmarks --out "$OUT"
stage fusion 25 "$PYTHON" -m benchmarks.speed.fusion --quick --device $benchmarks --out "$OUT"
stage training 20 "$PYTHON" -m benchmarks.speed.training --quick --device $benchmarks --out "$OUT"
stage host_time 25 "$PYTHON" -m benchmarks.speed.host_time --device $benchmarks --out "$OUT"
cat "$summary"
exit $failed
