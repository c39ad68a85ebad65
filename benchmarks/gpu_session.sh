#!/usr/bin/env bash
# All that a lent GPU is asked, in two calls: 330 s for truth and price, and, after a look and fixes,
# 270 s for tuning and whole steps.
#
#     OUT=results WHEELS=build/gpu/wheels bash benchmarks/gpu_session.sh 1
#     OUT=results WHEELS=build/gpu/wheels KEPT=build/gpu/kept.tar.gz bash benchmarks/gpu_session.sh 2
#     bash benchmarks/gpu_session.sh 1 --dry-run        # tiny sizes on whatever is here
#
# PYTHON names the interpreter. Nothing is fetched: WHEELS is a folder of wheels (`make gpu-wheels`),
# KEPT what part 1 left in OUT, so that nothing is compiled twice. BACKENDS names those to look at.
# What is missing there is skipped and says so.
#
# What fails must fail early: smoke before time. Each section has its own limit and fails alone; at
# its limit it is interrupted, not ended, and what it measured stays. The exit code is the number of
# sections that failed. At most 8 files lie in OUT.
set -uo pipefail

part=${1:?"usage: gpu_session.sh 1|2 [--dry-run]"}
dry=${2:-}
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
out=${OUT:-$root/benchmarks/results/gpu_session}
work=$(mktemp -d)
# Triton's cache names its files by their whole paths: in both parts the same.
kept=${TMPDIR:-/tmp}/fastpo-kept
rm -rf "$kept"
trap 'kill ${watching:-} 2>/dev/null; rm -rf "$work" "$kept"' EXIT
mkdir -p "$out" "$kept"
out=$(cd "$out" && pwd)
log=$out/part$part.log
failed=0
: >"$log"
cd "$root" || exit 1

say() { printf '%s\n' "$*" | tee -a "$log"; }

# section NAME SECONDS COMMAND...: runs it under a limit and the part's end, keeps its output.
section() {
    local name=$1 limit=$2 start=$SECONDS code
    shift 2
    [[ -z $dry ]] || limit=$seconds # a busy machine's seconds are no measure
    ((limit <= seconds - start)) || limit=$((seconds - start))
    if ((limit < 5)); then
        say "== $name: left out, the time is up"
        return 1
    fi
    say $'\n'"== $name (second $start, at most $limit)"
    # INT, which Python and pytest take as Ctrl-C: they write down what they have.
    # No pipe, which would wait for whatever a section leaves behind.
    timeout --signal=INT --kill-after=10 "$limit" env --default-signal=INT "$@" > >(tee -a "$log") 2>&1
    code=$?
    say "== $name: exit code $code after $((SECONDS - start)) s"
    [[ $code == 0 ]] || failed=$((failed + 1))
    return "$code"
}

bench() { section "$1" "$2" "$python" -m fastpo.bench "${@:3}"; }
script() { section "$1" "$2" "$python" "benchmarks/$3.py" "${@:4}"; }
has() { "$python" -c "import $1" 2>/dev/null; }

# What the extension is compiled of: after a fix between the parts the kept one is another's.
sources() { find csrc pyproject.toml -type f -print0 | sort -z | xargs -0 sha256sum | sha256sum; }

wheels() {
    export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
    export TRITON_CACHE_DIR=$kept/triton
    [[ -z ${KEPT:-} ]] || tar -xzf "$KEPT" -C "$kept"
    # Also where a call before this one has left one in the checkout.
    [[ -n $dry ]] || rm -f fastpo/_C*.so
    for extension in "$kept"/_C*.so; do
        [[ ! -f $extension || $(sources) != "$(cat "$kept/sources")" ]] || cp "$extension" fastpo/
    done
    [[ -n ${WHEELS:-} ]] || return 0
    # dill, by which TRL's data sets are hashed, copies modules of a folder with another name, and fails.
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$work/site-packages" \
        "$WHEELS"/*.whl >>"$log" 2>&1 || say "the wheels of $WHEELS could not be installed"
    export PYTHONPATH=$root:$work/site-packages${PYTHONPATH#"$root"}
}

# The extension goes into the checkout: Python finds that one first. Without it Triton and plain
# PyTorch serve, so it is compiled beside what needs none.
build() {
    if [[ -n $dry ]] || has fastpo._C; then
        say "fastpo._C is not built here"
        return
    fi
    for name in scikit_build_core pybind11; do
        if ! has "$name"; then
            say "fastpo._C is not built: $name is missing"
            return
        fi
    done
    find_nvcc
    { compiled || compiled -C cmake.define.FASTPO_CUTLASS=OFF; } >"$work/build.log" 2>&1 &
    building=$!
}

find_nvcc() {
    export CUDACXX=${CUDACXX:-$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)}
    [[ -x $CUDACXX ]] || say "fastpo._C will be without CUDA: no nvcc"
    [[ -x $CUDACXX ]] || unset CUDACXX
}

# Of this device alone. What cannot be compiled is left out of a wheel, and said in the log.
compiled() {
    local here
    here=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
    rm -rf "$work"/fastpo-*.whl "$work/wheel"
    CMAKE_BUILD_PARALLEL_LEVEL=$(nproc) timeout 140 "$python" -m pip wheel -v --no-deps --no-index \
        --no-build-isolation -C build-dir="$work/build" -C "cmake.define.CMAKE_CUDA_ARCHITECTURES=${here/#90/90a}-real" \
        --wheel-dir "$work" "$@" . &&
        "$python" -m zipfile -e "$work"/fastpo-*.whl "$work/wheel" &&
        cp "$work"/wheel/fastpo/_C*.so fastpo/whole &&
        # At once: what starts meanwhile would load half of a file.
        mv fastpo/whole "fastpo/$(basename "$work"/wheel/fastpo/_C*.so)"
}

# built SECOND: waits for the extension, at most until then.
built() {
    [[ -n ${building:-} ]] || return 0
    while kill -0 "$building" 2>/dev/null && ((SECONDS < $1)); do sleep 1; done
    grep -iE 'error|FAILED' "$work/build.log" | head -20 | tee -a "$log"
    has fastpo._C || say "fastpo._C is not there:" "$(tail -20 "$work/build.log")"
    say "fastpo._C was waited for until second $SECONDS"
}

# The backends that the smoke run found right, as variants of the head.
passed() {
    [[ ! -f $out/smoke.json ]] || "$python" - "$out/smoke.json" <<'PY'
import json, sys
print(",".join(f"fastpo {name}" for name in json.load(open(sys.argv[1]))["passed"]))
PY
}

# others REPORT OWN: of our variants those that did not take the device with them.
others() {
    "$python" - "$@" <<'PY'
import json, sys
rows, own = json.load(open(sys.argv[1]))["rows"], sys.argv[2].split(",")
lost = [row["variant"] for row in rows if row.get("lost")]
print(",".join(name for name in own if not any(each.startswith(name) for each in lost)))
PY
}

# A variant that takes the device with it, code 3, takes all later ones, and in its first shape every
# figure: then once more without it and without rivals.
heads() {
    local name=$1 limit=$2 own
    shift 2
    own=$(passed)
    [[ $own != *,* ]] || own=$(tr , '\n' <<<"$own" | grep -vx 'fastpo torch' | paste -sd ,) # the slowest
    if [[ -z $own ]]; then
        say "no $name: no backend is right"
        return
    fi
    bench "$name" "$limit" head --out "$out/$name.json" --variants "$own,$rivals" "$@"
    (($? == 3)) || return
    own=$(others "$out/$name.json" "$own")
    [[ -z $own ]] || bench "$name alone" "$limit" head --out "$out/${name}_own.json" --variants "$own" "$@"
}

tests() {
    local files=() rest=()
    if ! has pytest; then
        say "no tests: pytest is missing"
        return
    fi
    # Those first on which the most depends.
    files=(tests/ops/test_anchored.py tests/kernels/test_pair_kernels.py tests/ops/test_linear_logps.py)
    mapfile -t rest < <(grep -l 'mark\.gpu' --include='test_*.py' -r tests)
    mapfile -t files < <(printf '%s\n' "${files[@]}" "${rest[@]}" | awk '!seen[$0]++')
    ! has xdist || files+=(-n "$workers")
    section tests "$1" "$python" -m pytest -q -p no:cacheprovider -m gpu -rfE --maxfail 30 \
        "${files[@]}" "${collect[@]}"
}

profile() {
    local ncu=() found
    found=$(command -v ncu || ls /usr/local/cuda/bin/ncu /opt/nvidia/nsight-compute/*/ncu 2>/dev/null | head -1)
    if [[ -n $found ]]; then
        ncu=("$found" --profile-from-start off --clock-control none --log-file "$out/ncu.txt"
            --kernel-name 'regex:anchored_fwd|rows_fwd|rows_bwd|device_kernel'
            --section SpeedOfLight --section ComputeWorkloadAnalysis --section SchedulerStats
            --section WarpStateStats --section InstructionStats --section MemoryWorkloadAnalysis)
    else
        say "no counters: ncu is missing"
    fi
    section profile "$1" "${ncu[@]}" "$python" benchmarks/gpu_profile.py
}

# For part 2: the extension and what Triton compiled to, in a file of at most 16 MiB.
keep() {
    local between=(--exclude='*.ttir' --exclude='*.ttgir' --exclude='*.llir' --exclude='*.ptx' --exclude='*.source')
    cp fastpo/_C*.so "$kept/" 2>/dev/null
    sources >"$kept/sources"
    tar -czf "$out/kept.tar.gz" "${between[@]}" -C "$kept" .
    (($(stat -c %s "$out/kept.tar.gz") < 2 ** 24)) || tar -czf "$out/kept.tar.gz" --exclude ./triton -C "$kept" .
}

extension() {
    [[ -n ${building:-} ]] || return 0
    built "$1"
    script "smoke of the extension" 40 gpu_smoke cuda cutlass --out "$out/smoke.json"
}

part1() {
    build
    # Alone with the files of a new machine, which the later imports find in memory.
    script facts 45 gpu_ceilings --out "$out/facts.json" --repeats "$repeats"
    script smoke 75 gpu_smoke "${backends[@]}" --out "$out/smoke.json"
    if [[ -z $dry && $(passed) != *"fastpo triton"* ]]; then
        say "triton is wrong: nothing else is worth its time"
        return
    fi
    extension 125
    heads heads 95 --no-memory "${shapes[@]}" --repeats 7
    keep
    profile 35
    tests 75
    keep
}

steps() {
    read -ra words <<<"$1"
    bench "step ${words[0]}" 50 step --model "${words[@]}" --out "$out/step_${words[0]}.json"
}

part2() {
    build
    script smoke 45 gpu_smoke "${backends[@]}" --out "$out/smoke.json"
    script tune 55 gpu_tune --out "$out/tune.json" --processes "$processes" --repeats "$turns"
    extension 130
    heads heads 60 "${shapes[@]}" --repeats 9
    # Steps take what is the fastest head here.
    [[ -n $dry ]] || bench choice 15 choose "$out/heads.json"
    steps "${models[0]}"
    bench context 40 step --model "${context[@]}" --variants eager,fastpo --out "$out/context.json"
    for model in "${models[@]:1}"; do steps "$model"; done
}

if [[ -n $dry ]]; then
    seconds=900 repeats=1 turns=1 processes=1 workers=2 rivals=eager collect=(--collect-only -q)
    shapes=(--shapes "64,512,32" "32,512,32" --no-memory)
    models=("tiny --lengths 64 --pairs 1 --steps 1 --rounds 1 --fit")
    context=(tiny --lengths 64 --pairs 1 --steps 1 --rounds 1 --fit length --most 128)
else
    seconds=$((part == 1 ? 330 : 270)) repeats=20 turns=7 processes=12 workers=8 collect=()
    rivals="eager,trl,liger scaled,cce"
    shapes=(--shapes gpu --time-limit $((part == 1 ? 90 : 55)))
    models=(
        "qwen2.5-0.5b --lengths 1024 2048 --steps 5 --fit --time-limit 40"
        "llama-3-8b-lora --lengths 2048 --pairs 2 --steps 3 --checkpointing --fit --time-limit 40"
    )
    context=(qwen2.5-0.5b --lengths 1024 --steps 1 --checkpointing --fit length
        --memory-limit 24576 --most 65536 --time-limit 40)
fi

say "part $part, $(date -u +%FT%TZ), ${dry:-for real}, at most $seconds s"
# The driver, and what would explain a figure, or processes that are refused beside one another.
state=driver_version,compute_mode,mig.mode.current,clocks.max.sm,clocks.max.mem,power.limit
# What a card that is hot or at its power limit does meanwhile: a figure is of its clocks.
clocks=timestamp,clocks.sm,clocks.mem,power.draw,temperature.gpu
if command -v nvidia-smi >/dev/null; then
    say "$(timeout 10 nvidia-smi --query-gpu="$state" --format=csv 2>&1)"
    timeout "$seconds" nvidia-smi --query-gpu="$clocks" --format=csv -l 5 >>"$log" 2>&1 &
    watching=$!
fi
read -ra backends <<<"${BACKENDS:-triton anchored torch cuda cutlass}"
wheels
case $part in
1 | 2) "part$part" ;;
*)
    echo "usage: gpu_session.sh 1|2 [--dry-run], got $part" >&2
    exit 2
    ;;
esac
say $'\n'"$failed sections failed after $SECONDS s; results:"
ls -l "$out" | tee -a "$log"
exit "$failed"
