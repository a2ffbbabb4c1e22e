#!/bin/sh
# One call on each node; the arguments are those of `rewurst fit`:
#   NODES=8 HEAD=node-0 configs/scale/torchrun.sh --config=...
# If a process dies, torchrun restarts all of them, and `ckpt_path: auto` in the recipes resumes from the newest complete
# checkpoint. Lightning takes ranks and addresses from the variables that torchrun sets.
set -eu
: "${NODES:=1}" "${GPUS:=8}" "${HEAD:=localhost}" "${PORT:=29500}" "${RESTARTS:=3}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
exec torchrun --nnodes="$NODES" --nproc-per-node="$GPUS" --max-restarts="$RESTARTS" \
  --rdzv-backend=c10d --rdzv-endpoint="$HEAD:$PORT" --rdzv-id="${RUN:-rewurst}" \
  "$(command -v rewurst)" fit "$@" --trainer.num_nodes="$NODES" --trainer.devices="$GPUS"
