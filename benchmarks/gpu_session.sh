#!/usr/bin/env bash
# All that a lent GPU machine is asked, in two parts of at most 9 minutes.
#
#     OUT=results bash benchmarks/gpu_session.sh 1      # build, GPU tests, the four heads
#     OUT=results bash benchmarks/gpu_session.sh 2      # steps, long shapes, tile sweep, plots
#     bash benchmarks/gpu_session.sh 1 --dry-run        # tiny sizes on whatever is here
#
# PYTHON names the interpreter. Nothing is fetched; what is missing there is skipped and says so.
# Each section has its own time limit and fails alone; the exit code is the number that failed.
set -uo pipefail

part=${1:?"usage: gpu_session.sh 1|2 [--dry-run]"}
dry=${2:-}
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
out=${OUT:-$root/benchmarks/results/gpu_session}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$root"
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
log=$out/part$part.log
failed=0
: >"$log"

# section NAME SECONDS COMMAND...: runs it under a limit, keeps its output and goes on.
section() {
    local name=$1 limit=$2 start=$SECONDS code=0
    shift 2
    printf '\n== %s (at most %s s)\n' "$name" "$limit" | tee -a "$log"
    timeout --kill-after=10 "$limit" "$@" 2>&1 | tee -a "$log"
    code=${PIPESTATUS[0]}
    [[ $code == 0 ]] || failed=$((failed + 1))
    printf '== %s: exit code %s after %s s\n' "$name" "$code" $((SECONDS - start)) | tee -a "$log"
}

bench() { "$python" -m fastpo.bench "$@"; }
export -f bench
export python

facts() {
    "$python" - <<'PY'
import importlib.util, json, torch
from fastpo.bench import machine
from fastpo.ops.rows import registry
device = "cuda" if torch.cuda.is_available() else "cpu"
print(json.dumps(machine.facts(device), indent=1))
for name in registry.BACKENDS:
    print("backend", name, registry.unavailable(name, torch.device(device)) or "is there")
for name in ("trl", "peft", "liger_kernel", "cut_cross_entropy", "quack", "pytest", "matplotlib"):
    print("package", name, "is there" if importlib.util.find_spec(name) else "is missing")
PY
}

# The extension goes into the checkout: Python finds that one first. Without it the Triton and the
# plain PyTorch backends serve, on a GPU and from the sources alone.
build() {
    if "$python" -c 'import fastpo._C' 2>/dev/null; then
        echo "fastpo._C is there already"
        return 0
    fi
    for name in scikit_build_core pybind11 cmake; do
        if ! "$python" -c "import $name" 2>/dev/null && ! command -v "$name" >/dev/null; then
            echo "skipped: $name is missing; fastpo runs from the checkout without its extension"
            return 0
        fi
    done
    # FASTPO_CUTLASS, where it is set, names the headers of CUTLASS.
    CMAKE_BUILD_PARALLEL_LEVEL=$(nproc) "$python" -m pip wheel -q --no-deps --no-index \
        --no-build-isolation -C build-dir="$work/build" --wheel-dir "$work" . || return 1
    "$python" -m zipfile -e "$work"/fastpo-*.whl "$work/wheel"
    cp "$work"/wheel/fastpo/_C*.so fastpo/
    "$python" -c 'import fastpo._C as C; print("built; CUDA:", C.has_cuda, "CUTLASS:", C.has_cutlass)'
}

tests() {
    if ! "$python" -c 'import pytest' 2>/dev/null; then
        echo "skipped: pytest is missing"
        return 0
    fi
    local marked code
    mapfile -t marked < <(grep -l 'mark\.gpu' --include='test_*.py' -r tests)
    [[ -z $dry ]] || marked=(tests/ops/test_linear_logps.py)
    "$python" -m pytest -q -p no:cacheprovider -m gpu -rs "${marked[@]}"
    code=$?
    # Not marked, because they run anywhere; on this machine they run on the GPU.
    [[ -n $dry ]] || "$python" -m pytest -q -p no:cacheprovider -rs tests/ops/test_linear_logps.py \
        tests/kernels/test_kernels.py || code=$?
    [[ $code == 5 ]] && echo "skipped: no test wants a GPU here" && code=0
    return "$code"
}

# A rival that breaks the device breaks every later launch: then once more without rivals.
heads() {
    local file=$1
    shift
    bench head --out "$out/$file.json" "$@"
    local code=$?
    [[ $code -le 2 ]] && return "$code"
    echo "the run died with code $code; once more without rivals"
    bench head --out "$out/${file}_own.json" --variants fastpo,eager "$@"
}

plots() {
    if ! "$python" -c 'import matplotlib' 2>/dev/null; then
        echo "skipped: matplotlib is missing"
        return 0
    fi
    local code=0 file files=()
    for file in "$@"; do
        [[ ! -f $out/$file.json ]] || files+=("$out/$file.json")
    done
    bench plot "${files[@]}" --out "$work/plots" || code=$?
    # One file: few come back from a lent machine.
    [[ -d $work/plots ]] && tar -czf "$out/part${part}_plots.tar.gz" -C "$work/plots" .
    return "$code"
}
export -f facts build tests heads plots
export out work dry part

if [[ -n $dry ]]; then
    four=(--shapes 64,512,32 --repeats 1 --no-memory --variants fastpo,eager)
    walks=(--shapes 32,512,32 64,512,32 --repeats 1 --no-memory --variants fastpo,eager)
    long=()
    models=("tiny --lengths 64 --pairs 1 --steps 1 --rounds 1 --variants fastpo --fit")
    tiles=(--rows 4 --width 64 --repeats 1)
else
    # The time limit leaves room for the shape that was begun before it.
    four=(--shapes h200 --repeats 9 --time-limit 170)
    walks=(--shapes by-tokens-8b by-vocab-8b --repeats 5 --time-limit 55
        --variants "fastpo,eager,trl,liger,cce,quack,torch linear")
    long=(--shapes long --repeats 3
        --variants "fastpo triton,fastpo anchored,fastpo cutlass,eager,trl,liger scaled,cce,quack")
    models=(
        "qwen2.5-0.5b --lengths 1024 2048 4096 --steps 5 --memory-limit 24576 --checkpointing --most 65536"
        "qwen2.5-1.5b --lengths 2048 --steps 5 --fit"
        "llama-3-8b-lora --lengths 2048 --pairs 2 --steps 3 --checkpointing --fit length
            --memory-limit 40960 --most 32768"
    )
    tiles=()
fi

printf 'part %s, %s, %s\n' "$part" "$(date -u +%FT%TZ)" "${dry:-for real}" | tee -a "$log"
case $part in
1)
    if [[ -z $dry ]]; then section build 140 bash -c build; fi
    section facts 25 bash -c facts
    section tests 90 bash -c tests
    section heads 240 bash -c 'heads head "$@"' _ "${four[@]}"
    [[ -n $dry ]] || section plots 20 bash -c 'plots head'
    ;;
2)
    files=(walks long)
    limits=(140 60 80)
    for i in "${!models[@]}"; do
        read -ra words <<<"${models[$i]//$'\n'/ }"
        files+=("step_${words[0]}")
        limit=${limits[$i]}
        section "step ${words[0]}" "$limit" bash -c 'bench step "$@"' _ --model "${words[@]}" \
            --time-limit $((limit * 2 / 3)) --out "$out/step_${words[0]}.json"
    done
    section sweep 50 bash -c 'bench sweep "$@"' _ "${tiles[@]}" --out "$out/sweep.json"
    # Before the walks: it is one figure that nothing else gives.
    [[ -n $dry ]] || section long 60 bash -c 'heads long "$@"' _ "${long[@]}"
    section walks 90 bash -c 'heads walks "$@"' _ "${walks[@]}"
    section plots 40 bash -c 'plots "$@"' _ "${files[@]}"
    ;;
*)
    echo "usage: gpu_session.sh 1|2 [--dry-run], got $part" >&2
    exit 2
    ;;
esac
# Eight files come back from a lent machine.
if [[ $(find "$out" -type f | wc -l) -gt 8 ]]; then
    (cd "$out" && tar -czf "part${part}_json.tar.gz" ./*.json && rm ./*.json)
fi
printf '\n%s sections failed; results:\n' "$failed" | tee -a "$log"
ls -l "$out" | tee -a "$log"
exit "$failed"
