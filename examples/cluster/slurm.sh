#!/bin/bash
# A run on four SLURM nodes of four GPUs, on a shared disk. Submit it again after its time is up: it goes on.
#
#   sbatch examples/cluster/slurm.sh --workload imagefolder --data /shared/imagenet/val --model deit_small_patch16_224
#   sievit status --out /shared/runs/deit-small --watch
#
#SBATCH --job-name=sievit
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120  # two minutes before the end, so that results.parquet is written
#SBATCH --requeue
set -euo pipefail

OUT=${OUT:-/shared/runs/deit-small}
source "${SIEVIT:-$PWD}/.venv/bin/activate" # the same path on every node

nodes=($(scontrol show hostnames "$SLURM_JOB_NODELIST"))
head=${nodes[0]}
port=$((20000 + SLURM_JOB_ID % 20000)) # jobs of others on the node have ports of their own
address=$(srun --nodes=1 --ntasks=1 -w "$head" hostname --ip-address | awk '{print $1}')

srun --nodes=1 --ntasks=1 --overlap -w "$head" \
    ray start --head --block --node-ip-address="$address" --port="$port" --include-dashboard=false \
    --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="$SLURM_GPUS_ON_NODE" &
sleep 20
for node in "${nodes[@]:1}"; do
    srun --nodes=1 --ntasks=1 --overlap -w "$node" \
        ray start --block --address="$address:$port" \
        --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="$SLURM_GPUS_ON_NODE" &
done
sleep 20

export RAY_ADDRESS="$address:$port"
export SIEVIT_SHIP=nothing # the environment is on the shared disk
sievit run --out "$OUT" "$@" &
driver=$!
trap 'kill -TERM $driver' TERM # the driver ends as on Ctrl-C: finished trials are kept
status=0
wait $driver || status=$?
if kill -0 $driver 2>/dev/null; then wait $driver || status=$?; fi # the signal ended the first wait, not the driver
exit $status
