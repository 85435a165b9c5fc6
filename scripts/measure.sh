#!/usr/bin/env bash
# Everything that is measured on a GPU, stage by stage: scripts/measure.sh OUT [STAGE ...]
# The checkpoint is a random one of gpt-oss-20b's size in $MODEL, written if it is not there.
set -uo pipefail
out=$(realpath -m "$1")
shift
stages=("$@")
[ ${#stages[@]} -gt 0 ] || stages=(tests kernels latency profile startup serve)
cd "$(dirname "$0")/.."
mkdir -p "$out"
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 COLUMNS=${COLUMNS:-160}
MODEL=${MODEL:-/tmp/gpt-oss-20b-random}
headrace() { python3 -m headrace "$@"; }
checkpoint() { [ -e "$MODEL/config.json" ] || headrace bench synth --size 20b "$MODEL"; }

# A process for each file that has some: an error of the GPU ends no other file's tests. One file
# fills the GPU's memory, and runs after the others.
gpu_tests() {
  xargs -P "${JOBS:-8}" -I{} bash -c '
    told=$(timeout 400 python3 -m pytest -m gpu --tb short --durations 5 "{}" 2>&1) && ok=0 || ok=1
    printf "== %s\n%s\n" "{}" "$told"
    exit $ok'
}
tests() {
  local alone=tests/models/test_loader.py ok=0
  grep -rl --include 'test_*.py' pytest.mark.gpu tests | grep -v "$alone" | gpu_tests || ok=1
  echo "$alone" | gpu_tests || ok=1
  return $ok
}
kernels() { headrace bench kernels --out "$out"; }
tune() {
  headrace bench tune-launches --out "$out"
  headrace bench tune --out "$out"
  headrace bench tune-linear --out "$out"
}
engine=(--max-num-seqs 128 --max-num-batched-tokens 8192 --no-enable-prefix-caching)
latency() { checkpoint; headrace bench latency "$MODEL" "${engine[@]}" --csv "$out/latency.csv"; }
profile() {
  checkpoint
  headrace profile "$MODEL" --batch "${BATCHES:-1,16,64}" "${engine[@]}" --csv "$out/profile.csv"
}
adapters() {
  checkpoint
  headrace bench latency "$MODEL" "${engine[@]}" --adapters 2 --rank "${RANK:-64}" \
    --csv "$out/latency.csv"
}
startup() { checkpoint; headrace bench startup "$MODEL" --csv "$out/startup.csv"; }
serve() {
  checkpoint
  headrace bench sweep "$MODEL" --users "${USERS:-1,16,80}" --out "$out" \
    --serve-args "--max-num-seqs 128 --no-enable-prefix-caching"
}

failed=0
for stage in "${stages[@]}"; do
  echo "== $stage"
  SECONDS=0
  "$stage" 2>&1 | tee "$out/$stage.log" || failed=1
  echo "== $stage took $SECONDS s"
done
exit $failed
