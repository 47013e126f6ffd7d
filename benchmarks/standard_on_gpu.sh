#!/usr/bin/env bash
# The standard benches at published budgets on a GPU, for a limited time: run it again to continue.
#
#   benchmarks/standard_on_gpu.sh OUT DATA [SECONDS] [JOBS]
#
# OUT: the folder of results, with a folder for each bench. DATA: a folder with cifar10/ (train/ and
# test/, a folder for each class); if Fashion-MNIST is not installed, also fashion-mnist/ with its
# four IDX files. SECONDS: stop after that time (default 450: one call takes less than 8 minutes).
# JOBS: parallel cells on the GPU (default 3; with nine the GPU was at 99 %, and 1,000 steps of
# fine-tuning took 18 s).
set -euo pipefail

out=${1:?usage: $0 OUT DATA [SECONDS] [JOBS]} data=${2:?usage: $0 OUT DATA [SECONDS] [JOBS]}
left=${3:-450} jobs=${4:-3}
sweeps=$(cd "$(dirname "${BASH_SOURCE[0]}")/../sweeps" && pwd -P)

for bench in classic-standard distilled-standard; do
    folder=$out/$bench began=$SECONDS status=0
    resume=()
    [ ! -e "$folder/suite.json" ] || resume=(--resume)
    timeout --signal=INT --kill-after=20 "$left" distillsec benchmark "$sweeps/$bench.yaml" \
        --out "$folder" --data-dir "$data" --jobs "$jobs" "${resume[@]}" || status=$?
    left=$((left - SECONDS + began))
    case $status in
        0) echo "done: $folder/table.md" ;;
        124 | 130 | 137) echo "the time is over: run it again to continue"; exit 0 ;;
        *) exit "$status" ;;
    esac
done
