#!/usr/bin/env bash
# What waits for a GPU, in the order of its worth; each step goes on from what an interrupted one has left, so that the
# script is run again until it ends. Settings by environment variables:
#   DATA     what to train on            ("--dataset cifar10", or "--dataset folder --data-dir .data/cifar10")
#   NAME     what the data are, in words (CIFAR-10)
#   EPOCHS   of pretraining              (200)
#   SEEDS    of every run                ("0 1 2")
#   OUTSIDE  sets to tell CIFAR-10 from  ("cifar100", or a folder of images)
#   MORE     more settings, for a trial  ("--encoder resnet-small --batch-size 64")
set -euo pipefail
cd "$(dirname "$0")/.."
DATA=${DATA:---dataset cifar10}
NAME=${NAME:-CIFAR-10}
EPOCHS=${EPOCHS:-200}
SEEDS=${SEEDS:-0 1 2}
OUTSIDE=${OUTSIDE:-cifar100}
MORE=${MORE:-}
RUNS=${RUNS:-runs/gpu}
RESULTS=${RESULTS:-benchmarks/results}
PYTHON=${PYTHON:-python}
VJE="$PYTHON -m pyro_vje.cli"
mkdir -p "$RUNS" "$RESULTS"

seeds=""
for seed in $SEEDS; do seeds="$seeds --seed $seed"; done

# $1: name of the result; the rest: the command, without its folder. One that has ended is not run again.
measure() {
    name=$1
    shift
    $VJE "$@" --out "$RUNS/$name"
    $PYTHON -m benchmarks.collect "$RUNS/$name" --command "pyro-vje $*" --data "$NAME" --out "$RESULTS/gpu_$name.json"
}

if [ ! -f "$RESULTS/gpu_speed.json" ]; then # a table of a few minutes is made in one go
    $PYTHON -m benchmarks ${QUICK:+--quick} --out "$RUNS/speed.json"
    mv "$RUNS/speed.json" "$RESULTS/gpu_speed.json"
fi
# shellcheck disable=SC2086 # the settings are words
{
    measure controls ablate $DATA --encoder resnet18 --batch-size 512 --epochs "$EPOCHS" --knn-every 10 $MORE \
        --objective elbo --objective benchmarks.controls:simsiam --objective benchmarks.controls:vi_simsiam $seeds
    measure one-class benchmark one-class $DATA --encoder resnet18 --epochs "$EPOCHS" --knn-every 0 $MORE $seeds \
        --score-likelihood polar-student-t-exact
    measure one-class-vi_simsiam benchmark one-class $DATA --encoder resnet18 --epochs "$EPOCHS" --knn-every 0 $MORE $seeds \
        --objective benchmarks.controls:vi_simsiam --score-likelihood power-spherical
    for run in "$RUNS"/controls/cells/*objective-elbo*/; do
        measure "ood-$(basename "$run" | sed 's/.*_//')" benchmark ood --ckpt "$run" $(printf -- '--outside %s ' $OUTSIDE)
    done
}
if [ "$RESULTS" = benchmarks/results ]; then $PYTHON -m benchmarks.pages; fi
