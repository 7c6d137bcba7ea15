#!/bin/bash
# One server of a Slurm step: serve.sh RUN_DIR LOG_DIR. Its port and GPUs follow from its place on the node.
set -euo pipefail
gpus=()
each=${GPUS_PER_SERVER:-$([[ ${CUDA_VISIBLE_DEVICES:-} ]] && echo 1 || echo 0)}
if ((each)); then
    IFS=, read -ra given <<<"${CUDA_VISIBLE_DEVICES:?Slurm gave this step no GPUs: sbatch --gpus-per-node=N, or GPUS_PER_SERVER=0}"
    mine=("${given[@]:SLURM_LOCALID * each:each}")
    gpus=(--gpus "$(IFS=,; echo "${mine[*]}")")
else
    export CUDA_VISIBLE_DEVICES=  # a server on the CPU, also where there are GPUs
fi
exec "$PYTHON" -m neox_rl.run.serve --join "$1" --log-dir "$2" --port $((BASE_PORT + 4 + SLURM_LOCALID)) --timeout 600 "${gpus[@]}"
