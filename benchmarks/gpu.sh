#!/usr/bin/env bash
# Run the tests and benchmarks that need a GPU:
#
#     benchmarks/gpu.sh [--rehearse] OUTDIR [tests|benchmarks] [WORD]
#
# The tests run first, then the benchmarks, or only one of the two. Each of them takes
# less than nine minutes. The package need not be installed: `python3` (or PYTHON) must
# have NumPy, SciPy, CuPy and ml_dtypes; the tests also need pytest, pytest-xdist,
# pytest-timeout and hypothesis. With WORD, only tests whose names contain it run.
#
# OUTDIR receives three files:
#   summary.txt     a line for each step
#   failures.txt    each failed test, as soon as it fails
#   results.tar.gz  all outputs and figures, written again every 20 seconds, so that an
#                   interrupted run leaves its results
# A step that fails does not stop the next one. The exit status is the largest of all.
#
# --rehearse runs every step without a GPU: at small sizes, with a stand-in for CuPy that
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
export XLA_PYTHON_CLIENT_PREALLOCATE=false # otherwise JAX reserves most GPU memory
export OPENBLAS_NUM_THREADS=${OPENBLAS_NUM_THREADS:-1} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# nproc obeys these two variables, which limit threads and not processes.
processes=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)
processes=$((processes < 16 ? processes : 16))
patience=1
quick=() cases=(--every-case)
if [[ $rehearse ]]; then
    export PYTHONPATH=$PWD/tests/rehearsal:$PYTHONPATH
    export QM_CUPY_DTYPES=${QM_CUPY_DTYPES:-bfloat16} # the dtypes of the tests
    quick=(--rehearse) cases=()
    patience=6 # factor of the time limits: a CPU compiles and runs the kernels
else
    export PATH=$PATH:/usr/local/cuda/bin # compute-sanitizer may be here
fi

# Pack all results. A reader sees the old archive or the new one, never a part of one.
archive() {
    cp "$out/summary.txt" "$out/failures.txt" "$files/"
    tar -czf "$out/.$1.part" -C "$work" results 2>/dev/null || true
    mv "$out/.$1.part" "$out/results.tar.gz"
}
# Pack the results in the background, every 20 seconds. The output of this process is
# closed, because a caller may wait until nothing holds our output open.
(
    trap 'kill "$!"; exit' TERM
    while sleep 20 & wait "$!"; do archive background; done
) </dev/null >/dev/null 2>&1 &
background=$!
running=
# End the step that runs and the background process, then pack the last archive.
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

# step NAME SECONDS COMMAND...: run the command with a time limit, with its output in
# NAME.txt and its exit status in `status`. At the limit, the command gets an interrupt,
# and is killed five seconds later. In between, Python can write its results.
step() {
    local name=$1 limit=$(($2 * patience)) start=$SECONDS
    shift 2
    status=0
    set -m # otherwise bash makes a background command ignore interrupts
    timeout --signal=INT --kill-after=5 "$limit" "$@" >"$files/$name.txt" 2>&1 </dev/null &
    running=$!
    set +m
    wait "$running" || status=$?
    running=
    # With WORD, a step may select no test: pytest then exits with status 5.
    if [[ $word && $status == 5 ]]; then status=0; fi
    local line="$name: status $status, $((SECONDS - start)) s: $(last_line "$name")"
    echo "$line" | tee -a "$out/summary.txt"
    if ((status > worst)); then worst=$status; fi
    archive step
}

# Print the line for the summary: pytest's counts, or else the last line of the output.
last_line() {
    local counts='[0-9]+ (passed|failed|errors?|skipped)\b.* in [0-9.]+s'
    (grep -E "$counts" "$files/$1.txt" || grep -v '^\s*$' "$files/$1.txt" || echo "no output") |
        tail -n 1 | cut -c 1-100
}

# tests NAME SECONDS SELECTION FILES...: run tests in parallel processes. A process that
# hangs, or that has lost the GPU, is ended and replaced, and its test is reported.
tests() {
    local name=$1 limit=$2 selection=$3
    shift 3
    if [[ $word ]]; then selection="($selection) and $word"; fi
    step "$name" "$limit" env "${variables[@]}" "${checker[@]}" "$python" -m pytest \
        -p gpu_run -p no:cacheprovider -q -W default --tb=short -k "$selection" \
        "${cases[@]}" \
        --timeout=60 --timeout-method=thread "${workers[@]}" "$@"
}

# sanitize TOOL SECONDS SIZES SELECTION: run small tests of every kernel in one process
# under a tool of compute-sanitizer. Memory pools are off, so that every array is an
# allocation of its own and the tool knows its bounds.
sanitize() {
    local variables=(QM_CUPY_NO_POOL=1 PYTORCH_NO_CUDA_MEMORY_CACHING=1)
    local workers=() checker=()
    if [[ $rehearse ]]; then
        variables+=(QM_CUPY_SIZES=33)
    elif command -v compute-sanitizer >/dev/null; then
        variables+=(QM_CUPY_SIZES="$3")
        checker=(compute-sanitizer --tool "$1" --error-exitcode 9)
    else
        echo "$1: skipped, compute-sanitizer was not found" | tee -a "$out/summary.txt"
        return
    fi
    tests "$1" "$2" "$4" tests/test_gpu_parity.py
}

# compile NAME OPTIONS...: fill CuPy's cache. With WORD, the few tests compile their own.
compile() {
    if [[ $word ]]; then return; fi
    step "$1" 70 "$python" benchmarks/compile_kernels.py --processes "$processes" "${@:2}"
}

run_tests() {
    local checker=() workers=(-n "$processes" --max-worker-restart 64)
    local variables=(QM_CUPY_SIZES=33,257,1,128 QM_CUPY_LONG=600,1100,1600,4096)
    local long=QM_CUPY_LONG=600 # a shorter length for the basic kernels, which are slow
    if [[ $rehearse ]]; then
        variables=(QM_CUPY_SIZES=33 QM_CUPY_LONG=300) long=QM_CUPY_LONG=150
        compile compile-tests --dtypes bfloat16 float32
    else
        compile compile-tests
    fi
    # The steps are ordered so that the most important results come first.
    local first="test_parity and optimized and (33 or 257)" parity=tests/test_gpu_parity.py
    tests long 70 "optimized" tests/test_gpu_long.py
    tests parity-first 60 "$first" "$parity"
    tests parity-optimized 60 "(optimized or tf32 or subnormal) and not ($first)" "$parity"
    tests streams 60 "test" tests/test_gpu_{caches,streams,torch}.py tests/plot/test_gpu_plot.py
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
    if ((status == 4)); then # the process lost the GPU: a new one goes on
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

# Check that CuPy works, and describe the machine.
step machine 15 "$python" -c '
import sys, cupy, numpy
device = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())
cupy.zeros(1).get()
versions = f"NumPy {numpy.__version__}, CuPy {cupy.__version__}"
print(device["name"].decode(), sys.version.split()[0], versions, sep=", ")'
if ((worst)); then
    cat "$files/machine.txt" >&2
    exit 3 # every later step would fail as well
fi
if [[ $part != benchmarks ]]; then run_tests; fi
if [[ $part != tests ]]; then run_benchmarks; fi
exit "$worst"
