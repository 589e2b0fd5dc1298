#!/bin/bash
# One run over several machines without a scheduler: the same line on every machine, with its own NODE_RANK.
#
#   MASTER=10.0.0.1 NODES=2 NODE_RANK=0 GPUS=8 recipes/torchrun.sh policy=qwen2_5_vl_7b trainer=zero3 stage=grpo1
#   MASTER=10.0.0.1 NODES=2 NODE_RANK=1 GPUS=8 recipes/torchrun.sh policy=qwen2_5_vl_7b trainer=zero3 stage=grpo1
#
# All machines see the same runs_dir and data. MASTER is the address of machine 0; NODES=1 needs neither MASTER nor
# NODE_RANK. torchrun hides the exit code 75 of a run that was asked to leave (its own is 1): give the command again.
set -eu
cd "$(dirname "$0")/.."
NODES=${NODES:-1}
GPUS=${GPUS:-8}
exec "${TORCHRUN:-.venv/bin/torchrun}" \
    --nnodes="$NODES" --nproc-per-node="$GPUS" --node-rank="${NODE_RANK:-0}" \
    --master-addr="${MASTER:-127.0.0.1}" --master-port="${PORT:-29500}" \
    run.py trainer.devices="$GPUS" trainer.num_nodes="$NODES" "$@"
