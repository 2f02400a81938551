#!/bin/sh
# The main job on the reference model: a quarter of its decoder layers removed, measured on questions about digits that
# neither its training nor the calibration has seen. `make demo` runs this; everything it makes lies in demo/.
set -eu
cd "$(dirname "$0")/.."
run="${BIN:-.venv/bin}/lvlm-exporter"
model=examples/digits/model
data=examples/digits/data

rm -rf demo
mkdir demo
"$run" compress "$model" --out demo/digits-small --drop-ratio 0.25 --calibration "$data/calibration.jsonl"
echo
"$run" evaluate demo/digits-small --reference "$model" --task "$data/test.jsonl" --json demo/evaluation.json
echo
echo "card: demo/digits-small/README.md"
