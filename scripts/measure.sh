#!/usr/bin/env bash
# Everything that is measured on a GPU, stage by stage: scripts/measure.sh OUT [STAGE ...]
# The checkpoint is a random one of gpt-oss-20b's size in $MODEL, written if it is not there; the
# stage `checkpoint` does only that, and may run beside the tests. To measure less:
#   OPS="moe_layer router" SIZES="1 16 512"   of the stages kernels and tune-*
#   BATCHES=1,16,64                           of latency, adapters and profile
#   ADAPTERS="2x64 32x16"                     of adapters: how many, of which rank
#   LIMIT=150                                 seconds of each command, or file of tests
set -uo pipefail
out=$(realpath -m "$1")
shift
stages=("$@")
[ ${#stages[@]} -gt 0 ] || stages=(tests kernels latency long adapters adapter-load profile startup serve)
cd "$(dirname "$0")/.."
mkdir -p "$out"
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 COLUMNS=${COLUMNS:-160}
export TEST_LIMIT=${LIMIT:-400}
LIMIT=${LIMIT:-0}  # 0: none
MODEL=${MODEL:-/tmp/gpt-oss-20b-random}
# An interrupt lets a command stop the servers that it started.
headrace() { timeout -s INT -k 30 "$LIMIT" python3 -m headrace "$@"; }
checkpoint() { [ -e "$MODEL/config.json" ] || headrace bench synth --size 20b "$MODEL"; }

# A process for each file that has some: an error of the GPU ends no other file's tests. The
# largest files first; one file fills the GPU's memory, and runs after the others.
gpu_tests() {
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}  # many processes: more threads would wait in turns
  xargs -P "${JOBS:-8}" -I{} bash -c '
    told=$(timeout -s INT -k 30 "$TEST_LIMIT" python3 -m pytest -m gpu --tb short --durations 5 "{}" 2>&1) \
      && ok=0 || ok=1
    printf "== %s\n%s\n" "{}" "$told"
    exit $ok'
}
tests() {
  local alone=tests/models/test_loader.py ok=0
  grep -rl --include 'test_*.py' pytest.mark.gpu tests | grep -v "$alone" | xargs ls -S |
    gpu_tests || ok=1
  echo "$alone" | gpu_tests || ok=1
  return $ok
}

sizes=(${SIZES:+--size $SIZES})
kernels() { headrace bench kernels ${OPS:+--op $OPS} "${sizes[@]}" --out "$out"; }
tune-linear() { headrace bench tune-linear "${sizes[@]}" --out "$out"; }
tune-experts() { headrace bench tune "${sizes[@]}" --out "$out"; }

batches=(${BATCHES:+--batch "$BATCHES"})
engine=(--max-num-seqs 128 --max-num-batched-tokens 8192 --no-enable-prefix-caching)
latency() {
  checkpoint &&
    headrace bench latency "$MODEL" "${batches[@]}" "${engine[@]}" "$@" --csv "$out/latency.csv"
}
adapters() {
  local mix ok=0
  for mix in ${ADAPTERS:-2x64 2x16 32x16}; do
    latency --adapters "${mix%x*}" --rank "${mix#*x}" || ok=1
  done
  return $ok
}
adapter-load() {
  checkpoint && headrace bench adapter-load "$MODEL" "${engine[@]}" --csv "$out/adapter_load.csv"
}
profile() {
  checkpoint && headrace profile "$MODEL" "${batches[@]}" "${engine[@]}" --csv "$out/profile.csv"
}
startup() { checkpoint && headrace bench startup "$MODEL" --csv "$out/startup.csv"; }
# The adapters are loaded after the base was measured, on a server of their own.
serve() {
  local adapter
  checkpoint || return
  for adapter in 0 1; do
    [ -e "$MODEL-lora$adapter" ] ||
      headrace bench synth-adapter "$MODEL" "$MODEL-lora$adapter" --seed $adapter || return
  done
  headrace bench sweep "$MODEL" --users "${USERS:-1,16,80}" --out "$out" \
    --lora-modules "a=$MODEL-lora0" --lora-modules "b=$MODEL-lora1" \
    --serve-args "--max-num-seqs 128"
}
long() {  # one prompt as long as that, and one of the model's whole context
  checkpoint || return
  local prompt ok=0
  for prompt in 32768 130944; do
    headrace bench latency "$MODEL" --batch 1 --prompt $prompt "${engine[@]}" \
      --csv "$out/latency.csv" || ok=1
  done
  return $ok
}

failed=()
for stage in "${stages[@]}"; do
  echo "== $stage"
  SECONDS=0
  "$stage" 2>&1 | tee "$out/$stage.log" || failed+=("$stage")
  echo "== $stage took $SECONDS s"
done
grep -hE '^(FAILED|ERROR) ' "$out/tests.log" 2>/dev/null | cut -c1-200 | head -40
echo "== failed: ${failed[*]:-none}"
[ ${#failed[@]} -eq 0 ]
