#!/bin/sh
# What a router learns in 50 steps, by where tokens leave and by what it learns from: `route` prints the KL of held-out
# questions under three budgets.    sh examples/digits/sweep-router.sh        (LVLM_EXPORTER names another command)
set -eu
run() {
    name=$1
    shift
    echo "== $name"
    "${LVLM_EXPORTER:-lvlm-exporter}" route examples/digits/model --out "work/sweep-router/$name" --quiet \
        --calibration examples/digits/data/calibration.jsonl --samples 800 --steps 50 "$@"
}
mkdir -p work/sweep-router
run after-2
run open-gates --loss-option least=1.0
run weight-1 --loss-option weight=1.0
run preference --loss preference --learning-rate 0.0007
run preference-without-noise --loss preference --learning-rate 0.0007 --loss-option noise=0.0
run preference-as-published --loss preference --learning-rate 0.0007 --read-at 0 --loss-option noise_on=heads
run relaxed --loss relaxed --learning-rate 0.0007
run after-0 --drop-at 0
run after-1 --drop-at 1
run after-3 --drop-at 3
run power-1 --loss-option power=1.0
run draws-3 --loss-option draws=3
run sets-6 --loss-option sets=6
run relaxed-after-0 --loss relaxed --learning-rate 0.0007 --drop-at 0
