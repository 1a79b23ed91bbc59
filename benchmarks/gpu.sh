#!/usr/bin/env bash
# What waits for a GPU, in the order of its worth, in pieces of PIECE seconds: what does not end in one goes on in the
# next, and a piece that was cut ends with the last row of each run's metrics. Run it again until it says "all is done".
# Settings by environment variables:
#   DATA     what to train on            ("--dataset cifar10", or "--dataset folder --data-dir .data/cifar10")
#   NAME     what the data are, in words (CIFAR-10)
#   EPOCHS   of the long runs            (200; a twentieth for the search, a quarter for one class)
#   SEEDS    of every run                ("0 1 2")
#   ENCODER, BATCH                       (resnet18, 512)
#   OUTSIDE  sets to tell CIFAR-10 from  ("cifar100", or a folder of images)
#   PIECE    seconds, 0: no limit        (590)
#   SPEED    what is timed               (everything: python -m benchmarks --help has the names)
#   MORE     more settings, for a trial  ("--hidden-dim 64")
set -euo pipefail
cd "$(dirname "$0")/.."
DATA=${DATA:---dataset cifar10}
NAME=${NAME:-CIFAR-10}
EPOCHS=${EPOCHS:-200}
SEEDS=${SEEDS:-0 1 2}
ENCODER=${ENCODER:-resnet18}
BATCH=${BATCH:-512}
OUTSIDE=${OUTSIDE:-cifar100}
PIECE=${PIECE:-590}
MORE=${MORE:-}
RUNS=${RUNS:-runs/gpu}
RESULTS=${RESULTS:-benchmarks/results}
PYTHON=${PYTHON:-python}
VJE="$PYTHON -m pyro_vje.cli"
SHORT=$((EPOCHS > 20 ? EPOCHS / 20 : 1))
mkdir -p "$RUNS" "$RESULTS"
touch "$RUNS/done"

# $1: a folder, for the numbers so far; the rest: a command. In what is left of the piece, which ends where that is nothing.
within() {
    folder=$1 status=0 left=$((PIECE - SECONDS))
    shift
    if [ "$PIECE" = 0 ]; then left=0; elif [ "$left" -lt 1 ]; then status=124; fi
    if [ "$status" = 0 ]; then timeout -s INT -k 60 "$left" "$@" || status=$?; fi
    if [ "$status" = 124 ] || [ "$status" = 130 ]; then
        for csv in "$folder"/cells/*/metrics.csv; do
            if [ -f "$csv" ]; then echo "$csv: $(head -n 1 "$csv") / $(tail -n 1 "$csv")"; fi
        done
        echo "the piece is over after $SECONDS seconds, in $folder: run this again"
        exit 0
    fi
    return "$status"
}

# $1: name of the result; the rest: the command, without its folder. One that has ended is not run again.
measure() {
    name=$1
    shift
    if grep -Fxq -- "$name $*" "$RUNS/done"; then return; fi
    within "$RUNS/$name" $VJE "$@" --out "$RUNS/$name"
    $PYTHON -m benchmarks.collect "$RUNS/$name" --command "pyro-vje $*" --data "$NAME" --out "$RESULTS/gpu_$name.json"
    echo "$name $*" >> "$RUNS/done"
}

if [ ! -f "$RESULTS/gpu_speed.json" ]; then # a table of a few minutes, made in one go
    # shellcheck disable=SC2086 # the names are words
    $PYTHON -m benchmarks ${QUICK:+--quick} ${SPEED:+--only $SPEED} --out "$RUNS/speed.json"
    mv "$RUNS/speed.json" "$RESULTS/gpu_speed.json"
fi
# shellcheck disable=SC2086 # the settings are words
{
    train="$DATA --encoder $ENCODER --batch-size $BATCH $MORE"
    simsiam="--objective elbo --objective benchmarks.controls:simsiam"
    one_class="benchmark one-class $DATA --encoder $ENCODER --knn-every 0 $MORE"
    # The search: two views against four in the same time.
    measure search-2 ablate $train --epochs $((2 * SHORT)) --knn-every "$SHORT" $simsiam --seed 0
    measure search-4 ablate $train --epochs "$SHORT" --knn-every "$SHORT" --views 4 --targets each --targets mean --seed 0
    for seed in $SEEDS; do
        measure controls ablate $train --epochs "$EPOCHS" --knn-every 10 $simsiam \
            --objective benchmarks.controls:vi_simsiam --seed "$seed"
        measure one-class-rotations $one_class --epochs "$EPOCHS" --rotations 0.4 --seed "$seed"
        measure fastsiam ablate $train --epochs "$((EPOCHS / 2))" --knn-every 10 --views 4 --targets mean $simsiam --seed "$seed"
        measure one-class $one_class --epochs "$EPOCHS" --seed "$seed" --score-likelihood polar-student-t-exact
        for run in "$RUNS"/controls/cells/*objective-elbo*seed-"$seed"/; do
            measure "ood-$seed" benchmark ood --ckpt "$run" $(printf -- '--outside %s ' $OUTSIDE)
        done
    done
}
if [ "$RESULTS" = benchmarks/results ]; then $PYTHON -m benchmarks.pages; fi
echo "all is done"
