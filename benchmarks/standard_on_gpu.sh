#!/usr/bin/env bash
# The standard bench on a GPU, in pieces: run it again to go on where it stopped.
#
#   benchmarks/standard_on_gpu.sh OUT DATA [SECONDS] [JOBS]
#
# OUT: the folder of results. DATA: holds cifar10/ (train/ and test/, a folder a class); where
# Fashion-MNIST is not installed, also fashion-mnist/ with its four IDX files. SECONDS: stop after
# that long (default 450, so that a piece takes less than 8 minutes). JOBS: cells at once on the
# card (default 4; a cell leaves it idle half of the time).
set -euo pipefail

out=${1:?usage: $0 OUT DATA [SECONDS] [JOBS]} data=${2:?usage: $0 OUT DATA [SECONDS] [JOBS]}
seconds=${3:-450} jobs=${4:-4}
suite=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)/sweeps/classic-standard.yaml
resume=()
[ ! -e "$out/suite.json" ] || resume=(--resume)

status=0
timeout --signal=INT --kill-after=20 "$seconds" \
    distillsec benchmark "$suite" --out "$out" --data-dir "$data" --jobs "$jobs" "${resume[@]}" ||
    status=$?
case $status in
    0) echo "done: $out/table.md" ;;
    124 | 130 | 137) echo "stopped after $seconds s: run it again to go on" ;;
    *) exit "$status" ;;
esac
