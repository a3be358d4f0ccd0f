#!/usr/bin/env bash
# All that needs a GPU, in ten minutes at most: benchmarks/gpu.sh OUTDIR
#
# The tests, compute-sanitizer over the small ones, the benchmarks of kernels, whole
# calls, gradients and the door, and what the kernels take of the GPU. PYTHON chooses the
# interpreter. A step that fails does not stop the next; the exit status is the worst of
# all.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${1:?usage: benchmarks/gpu.sh OUTDIR}"
mkdir -p "$1"
out=$(cd "$1" && pwd)
python=${PYTHON:-python}
worst=0

# step NAME SECONDS COMMAND...: run it with that long to go, its output in NAME.txt.
step() {
    local name=$1 limit=$2 status=0 start=$SECONDS
    shift 2
    timeout --kill-after=5 "$limit" "$@" >"$out/$name.txt" 2>&1 || status=$?
    echo "$name: status $status, $((SECONDS - start)) s" | tee -a "$out/summary.txt"
    if ((status > worst)); then worst=$status; fi
}

sanitize() {
    # Without pools, every array has bounds of its own.
    step "$1" 50 env QM_CUPY_NO_POOL=1 PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        compute-sanitizer --tool "$1" --error-exitcode 9 \
        "$python" -m pytest -m gpu tests/test_gpu.py -k "not torch" -x -q
}

: >"$out/summary.txt"
step gpu-tests 140 "$python" -m pytest -m gpu -q
if command -v compute-sanitizer >/dev/null; then
    sanitize memcheck
    sanitize racecheck
else
    echo "no compute-sanitizer" | tee -a "$out/summary.txt"
fi
step kernels 135 "$python" benchmarks/kernels.py --minutes 1.8 --json "$out/kernels.json"
step pipeline 100 "$python" benchmarks/pipeline.py --seconds 0.5 \
    --json "$out/pipeline.json" --plot "$out/pipeline.png"
step gradients 50 "$python" benchmarks/gradients.py --json "$out/gradients.json"
step overhead 25 "$python" benchmarks/overhead.py --json "$out/overhead.json"
if "$python" -c "from cuda.bindings import nvrtc" 2>/dev/null; then
    # For this GPU alone: all architectures take minutes, and any machine will do.
    arch=$("$python" -c "import cupy; print(cupy.cuda.Device().compute_capability)" ||
        echo 90)
    step resources 40 "$python" benchmarks/resources.py --arch "$arch" \
        --json "$out/resources.json"
else
    echo "no cuda-bindings" | tee -a "$out/summary.txt"
fi
exit "$worst"
