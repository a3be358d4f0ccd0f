#!/usr/bin/env bash
# All that needs a GPU: benchmarks/gpu.sh [--rehearse] OUTDIR [tests|benchmarks] [WORD]
#
# Tests, then benchmarks, or one of the two, each in less than nine minutes. No install
# is needed: `python3` (or PYTHON) must have NumPy, SciPy, CuPy and ml_dtypes; tests take
# pytest, pytest-xdist, pytest-timeout and hypothesis too. With WORD, only the tests whose
# names hold it run.
#
# OUTDIR gets summary.txt, a line for each step; failures.txt, each failed test as it
# fails; and results.tar.gz with all outputs and figures, made anew every 20 seconds, so
# that a run that is cut short leaves what it has. A step that fails does not stop the
# next one; the exit status is the worst of all.
#
# --rehearse runs every step without a GPU: small sizes, on a stand-in for CuPy that
# runs the kernels on the CPU.
set -euo pipefail
cd "$(dirname "$0")/.."
usage="usage: benchmarks/gpu.sh [--rehearse] OUTDIR [tests|benchmarks] [WORD]"

rehearse=
if [[ ${1-} == --rehearse ]]; then rehearse=1 && shift; fi
if (($# < 1 || $# > 3)) || [[ ! ${2-tests} =~ ^(tests|benchmarks)$ ]]; then
    echo "$usage" >&2
    exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
part=${2-}
word=${3-}
python=${PYTHON:-python3}
worst=0
status=0

work=$(mktemp -d)
files=$work/results
mkdir "$files" "$work/references"
: >"$out/summary.txt"
: >"$out/failures.txt"
export QM_CUPY_FAILURES=$out/failures.txt QM_CUPY_REFERENCES=$work/references
export PYTHONPATH=$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export XLA_PYTHON_CLIENT_PREALLOCATE=false # or JAX takes most of the GPU's memory
export OPENBLAS_NUM_THREADS=${OPENBLAS_NUM_THREADS:-1} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

processes=$(nproc)
processes=$((processes < 16 ? processes : 16))
patience=1
quick=()
dtypes=()
if [[ $rehearse ]]; then
    export PYTHONPATH=$PWD/tests/rehearsal:$PYTHONPATH
    export QM_CUPY_SIZES=${QM_CUPY_SIZES:-33} QM_CUPY_LONG=${QM_CUPY_LONG:-300}
    export QM_CUPY_DTYPES=${QM_CUPY_DTYPES:-bfloat16}
    quick=(--rehearse)
    patience=6 # for kernels that a CPU compiles and runs
    dtypes=(--dtypes bfloat16 float32) # float32 for what is summed
else
    export PATH=$PATH:/usr/local/cuda/bin # where compute-sanitizer may be
fi

# Whole or not at all, for whoever fetches it meanwhile.
archive() {
    cp "$out/summary.txt" "$out/failures.txt" "$files/"
    tar -czf "$out/.$1.part" -C "$work" results 2>/dev/null || true
    mv "$out/.$1.part" "$out/results.tar.gz"
}
# Without our output, which would stay open for as long as it sleeps.
(while sleep 20; do archive background; done) </dev/null >/dev/null 2>&1 &
background=$!
finish() {
    kill "$background"
    wait "$background" || true
    archive last
    rm -rf "$work" "$out/.background.part"
} 2>/dev/null
trap finish EXIT

# step NAME SECONDS COMMAND...: run it with that long to go, its output in NAME.txt and
# its exit status in `status`.
# An interrupt comes first, which leaves Python the time to write what it has.
step() {
    local name=$1 limit=$(($2 * patience)) start=$SECONDS
    shift 2
    status=0
    timeout --signal=INT --kill-after=10 "$limit" "$@" >"$files/$name.txt" 2>&1 || status=$?
    # Of tests that are chosen by a word, a step may have none.
    if [[ $word && $status == 5 ]]; then status=0; fi
    local last
    last=$(grep -v '^\s*$' "$files/$name.txt" | tail -n 1 | cut -c 1-100)
    echo "$name: status $status, $((SECONDS - start)) s: $last" | tee -a "$out/summary.txt"
    if ((status > worst)); then worst=$status; fi
    archive step
}

# tests NAME SECONDS SELECTION FILES...: in parallel processes. One that hangs, or that
# its GPU has left, is ended, named and replaced.
tests() {
    local name=$1 limit=$2 selection=$3
    shift 3
    if [[ $word ]]; then selection="($selection) and $word"; fi
    step "$name" "$limit" "${checker[@]}" "$python" -m pytest -p gpu_run \
        -p no:cacheprovider -q -W default --tb=short -k "$selection" \
        --timeout=60 --timeout-method=thread "${workers[@]}" "$@"
}

# sanitize TOOL SELECTION: one small test for each kernel, in a process that the tool
# watches. Without pools, every array has bounds of its own.
sanitize() {
    local workers=() checker=(env QM_CUPY_NO_POOL=1 PYTORCH_NO_CUDA_MEMORY_CACHING=1)
    if [[ ! $rehearse ]]; then
        if ! command -v compute-sanitizer >/dev/null; then
            echo "$1: no compute-sanitizer" | tee -a "$out/summary.txt"
            return
        fi
        checker+=(compute-sanitizer --tool "$1" --error-exitcode 9)
    fi
    tests "$1" 50 "$2" tests/test_gpu_parity.py
}

run_tests() {
    local checker=() workers=(-n "$processes" --max-worker-restart 64)
    if [[ ! $word ]]; then
        step compile 80 "$python" benchmarks/compile_kernels.py \
            --processes "$processes" "${dtypes[@]}"
    fi
    tests long 80 "optimized" tests/test_gpu_long.py
    tests parity-optimized 90 "optimized or tf32" tests/test_gpu_parity.py
    tests streams 55 "test" tests/test_gpu_streams.py
    tests parity-basic 80 "basic" tests/test_gpu_parity.py
    sanitize memcheck "test_parity and padded and bfloat16"
    sanitize racecheck "test_parity and padded and bfloat16 and optimized"
}

run_benchmarks() {
    local figures=(--json "$files/kernels.json" --plot "$files/kernels.png")
    step kernels 200 "$python" benchmarks/kernels.py "${quick[@]}" --minutes 3 \
        "${figures[@]}"
    if ((status == 4)); then # the GPU has left that process
        step kernels-resumed 60 "$python" benchmarks/kernels.py "${quick[@]}" --resume \
            --minutes 0.8 "${figures[@]}"
    fi
    step pipeline 100 "$python" benchmarks/pipeline.py "${quick[@]}" --seconds 0.5 \
        --minutes 1.4 --json "$files/pipeline.json" --plot "$files/pipeline.png"
    step overhead 40 "$python" benchmarks/overhead.py "${quick[@]}" \
        --json "$files/overhead.json"
    step gradients 80 "$python" benchmarks/gradients.py "${quick[@]}" --no-compile \
        --minutes 1.1 --json "$files/gradients.json"
}

step machine 20 "$python" - <<'PYTHON'
import sys, cupy, numpy
device = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())
cupy.zeros(1).get()
print(f"{device['name'].decode()}, Python {sys.version.split()[0]}, "
      f"NumPy {numpy.__version__}, CuPy {cupy.__version__}")
PYTHON
if ((worst)); then
    cat "$files/machine.txt" >&2
    exit 3 # nothing that follows could say more
fi
if [[ $part != benchmarks ]]; then run_tests; fi
if [[ $part != tests ]]; then run_benchmarks; fi
exit "$worst"
