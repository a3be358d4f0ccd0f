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
if [[ $python == */* ]]; then python=$(realpath --no-symlinks "$python"); fi
cd "$(dirname "$0")/.."
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

processes=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc) # which heeds these
processes=$((processes < 16 ? processes : 16))
patience=1
quick=() cases=(--every-case)
if [[ $rehearse ]]; then
    export PYTHONPATH=$PWD/tests/rehearsal:$PYTHONPATH
    export QM_CUPY_DTYPES=${QM_CUPY_DTYPES:-bfloat16} # of those that tests take
    quick=(--rehearse) cases=()
    patience=6 # for kernels that a CPU compiles and runs
else
    export PATH=$PATH:/usr/local/cuda/bin # where compute-sanitizer may be
fi

# Pack all results. A reader finds the old archive or the new one, never a part.
archive() {
    cp "$out/summary.txt" "$out/failures.txt" "$files/"
    tar -czf "$out/.$1.part" -C "$work" results 2>/dev/null || true
    mv "$out/.$1.part" "$out/results.tar.gz"
}
# Its output is closed, because a caller may wait for the end of ours.
(
    trap 'kill "$!"; exit' TERM
    while sleep 20 & wait "$!"; do archive background; done
) </dev/null >/dev/null 2>&1 &
background=$!
running=
finish() {
    trap - EXIT TERM INT
    if [[ $running ]]; then kill -TERM "$running" || true; fi
    kill "$background" || true
    wait || true
    archive last
    rm -rf "$work" "$out/.background.part"
} 2>/dev/null
trap finish EXIT
trap 'exit 143' TERM
trap 'exit 130' INT

# step NAME SECONDS COMMAND...: run it with that long to go, its output in NAME.txt and
# its exit status in `status`. At the limit an interrupt comes first, which leaves Python
# the time to write what it has.
step() {
    local name=$1 limit=$(($2 * patience)) start=$SECONDS
    shift 2
    status=0
    set -m # or bash would have the step ignore interrupts
    timeout --signal=INT --kill-after=5 "$limit" "$@" >"$files/$name.txt" 2>&1 </dev/null &
    running=$!
    set +m
    wait "$running" || status=$?
    running=
    # With WORD, a step may have no test: pytest's status 5.
    if [[ $word && $status == 5 ]]; then status=0; fi
    local line="$name: status $status, $((SECONDS - start)) s: $(last_line "$name")"
    echo "$line" | tee -a "$out/summary.txt"
    if ((status > worst)); then worst=$status; fi
    archive step
}

# The line that says most: pytest's counts, or the last one.
last_line() {
    local counts='[0-9]+ (passed|failed|errors?|skipped)\b.* in [0-9.]+s'
    (grep -E "$counts" "$files/$1.txt" || grep -v '^\s*$' "$files/$1.txt" || echo "no output") |
        tail -n 1 | cut -c 1-100
}

# tests NAME SECONDS SELECTION FILES...: in parallel processes. A process that hangs, or
# that has lost the GPU, is ended, named and replaced.
tests() {
    local name=$1 limit=$2 selection=$3
    shift 3
    if [[ $word ]]; then selection="($selection) and $word"; fi
    step "$name" "$limit" env "${variables[@]}" "${checker[@]}" "$python" -m pytest \
        -p gpu_run -p no:cacheprovider -q -W default --tb=short -k "$selection" \
        "${cases[@]}" \
        --timeout=60 --timeout-method=thread "${workers[@]}" "$@"
}

# sanitize TOOL SECONDS SIZES SELECTION: small tests of every kernel, in a process that the
# tool watches. Without pools, every array has bounds of its own.
sanitize() {
    local variables=(QM_CUPY_NO_POOL=1 PYTORCH_NO_CUDA_MEMORY_CACHING=1)
    local workers=() checker=()
    if [[ $rehearse ]]; then
        variables+=(QM_CUPY_SIZES=33)
    elif command -v compute-sanitizer >/dev/null; then
        variables+=(QM_CUPY_SIZES="$3")
        checker=(compute-sanitizer --tool "$1" --error-exitcode 9)
    else
        echo "$1: no compute-sanitizer" | tee -a "$out/summary.txt"
        return
    fi
    tests "$1" "$2" "$4" tests/test_gpu_parity.py
}

compile() {
    if [[ $word ]]; then return; fi
    step "$1" 70 "$python" benchmarks/compile_kernels.py --processes "$processes" "${@:2}"
}

run_tests() {
    local checker=() workers=(-n "$processes" --max-worker-restart 64)
    local variables=(QM_CUPY_SIZES=33,257,1,128 QM_CUPY_LONG=600,1100,1600,4096)
    local long=QM_CUPY_LONG=600 # for the basic kernels, which are slow
    if [[ $rehearse ]]; then
        variables=(QM_CUPY_SIZES=33 QM_CUPY_LONG=300) long=QM_CUPY_LONG=150
        compile compile-tests --dtypes bfloat16 float32
    else
        compile compile-tests
    fi
    local first="test_parity and optimized and (33 or 257)" parity=tests/test_gpu_parity.py
    tests long 70 "optimized" tests/test_gpu_long.py
    tests parity-first 60 "$first" "$parity"
    tests parity-optimized 60 "(optimized or tf32 or subnormal) and not ($first)" "$parity"
    tests streams 60 "test" tests/test_gpu_{streams,torch}.py tests/plot/test_gpu_plot.py
    variables+=("$long")
    tests basic 60 "basic" "$parity" tests/test_gpu_long.py
    sanitize memcheck 45 33,128 "test_parity and padded and bfloat16"
    sanitize racecheck 35 128 "test_parity and padded and bfloat16 and optimized"
}

run_benchmarks() {
    local figures=(--json "$files/kernels.json" --plot "$files/kernels.png")
    compile compile-benchmarks --dtypes bfloat16 float16 float32
    step kernels 180 "$python" benchmarks/kernels.py "${quick[@]}" --minutes 2.7 \
        "${figures[@]}"
    if ((status == 4)); then # that process has lost the GPU
        step kernels-resumed 50 "$python" benchmarks/kernels.py "${quick[@]}" --resume \
            --minutes 0.6 "${figures[@]}"
    fi
    step pipeline 80 "$python" benchmarks/pipeline.py "${quick[@]}" --seconds 0.5 \
        --minutes 1.1 --json "$files/pipeline.json" --plot "$files/pipeline.png"
    step overhead 30 "$python" benchmarks/overhead.py "${quick[@]}" \
        --json "$files/overhead.json"
    step gradients 70 "$python" benchmarks/gradients.py "${quick[@]}" --no-compile \
        --minutes 0.9 --json "$files/gradients.json"
}

step machine 15 "$python" -c '
import sys, cupy, numpy
device = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())
cupy.zeros(1).get()
versions = f"NumPy {numpy.__version__}, CuPy {cupy.__version__}"
print(device["name"].decode(), sys.version.split()[0], versions, sep=", ")'
if ((worst)); then
    cat "$files/machine.txt" >&2
    exit 3 # nothing that follows could say more
fi
if [[ $part != benchmarks ]]; then run_tests; fi
if [[ $part != tests ]]; then run_benchmarks; fi
exit "$worst"
