#!/usr/bin/env bash
# What waits for a GPU, in the order of its worth, in pieces of PIECE seconds: what does not end in one goes on in the
# next, and a piece that was cut ends with the last row of each run's metrics. Run it again until it says "all is done".
# Settings by environment variables:
#   DATA     what to train on            ("--dataset cifar10", or "--dataset folder --data-dir .data/cifar10")
#   NAME     what the data are, in words (CIFAR-10)
#   EPOCHS   of the long runs            (200; a twentieth for the search, a quarter for one class)
#   SEEDS    of every run                ("0 1 2")
#   ENCODER, BATCH                       (resnet18, 128)
#   OUTSIDE  sets to tell CIFAR-10 from  ("cifar100", or a folder of images)
#   PIECE    seconds, 0: no limit        (590)
#   SPEED    what is timed               (everything: python -m benchmarks --help has the names)
#   MORE     more settings of VJE        ("--holdout 0.1")
set -euo pipefail
cd "$(dirname "$0")/.."
DATA=${DATA:---dataset cifar10}
NAME=${NAME:-CIFAR-10}
EPOCHS=${EPOCHS:-200}
SEEDS=${SEEDS:-0 1 2}
ENCODER=${ENCODER:-resnet18}
BATCH=${BATCH:-128}
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
    train="$DATA --encoder $ENCODER --batch-size $BATCH"
    # What 25 epochs gained by (learning.md), but for the crops: hundreds of epochs may want the small ones. MORE comes last.
    vje="--projector linear --hidden-dim 2048 --kl-weight 0.1 $MORE"
    simsiam="--projector mlp --hidden-dim 2048 --objective benchmarks.controls:simsiam"
    one_class="benchmark one-class $DATA --encoder $ENCODER --batch-size $BATCH --knn-every 0"
    # The search, in equal time: crops × batches, four views, and the package's defaults.
    short="--epochs $((2 * SHORT)) --knn-every $SHORT --seed 0"
    measure search-vje ablate $train --batch-size $((4 * BATCH)) $short --crop-scale 0.2 --crop-scale 0.4 $vje
    measure search-views ablate $train --epochs "$SHORT" --knn-every "$SHORT" --seed 0 --views 4 $vje
    measure search-default ablate $train $short $MORE
    for seed in $SEEDS; do
        long="--epochs $EPOCHS --knn-every 10 --seed $seed"
        measure vje ablate $train $long $vje
        measure controls ablate $train $long $simsiam --objective benchmarks.controls:vi_simsiam $MORE
        measure one-class-rotations $one_class --epochs "$EPOCHS" --rotations 0.4 --seed "$seed" $MORE
        measure fastsiam ablate $train --epochs "$((EPOCHS / 2))" --knn-every 10 --views 4 --targets mean $simsiam --seed "$seed" $MORE
        measure one-class $one_class --epochs "$EPOCHS" --seed "$seed" --score-likelihood polar-student-t-exact $MORE
        for run in "$RUNS"/vje/cells/*seed-"$seed"/; do
            measure "ood-$seed" benchmark ood --ckpt "$run" $(printf -- '--outside %s ' $OUTSIDE)
        done
    done
}
if [ "$RESULTS" = benchmarks/results ]; then $PYTHON -m benchmarks.pages; fi
echo "all is done"
