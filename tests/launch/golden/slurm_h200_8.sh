#!/bin/bash
# neo-9b on h200:8: one process per GPU
#SBATCH --job-name=neo-9b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=neo-9b-%j.log

set -u
unset http_proxy https_proxy HTTP_PROXY HTTPS_PROXY  # processes talk to each other directly
export NEO_JAX_FLAGS=default
export XLA_FLAGS='--xla_gpu_all_gather_combine_threshold_bytes=1073741824 --xla_gpu_reduce_scatter_combine_threshold_bytes=1073741824 --xla_gpu_all_reduce_combine_threshold_bytes=1073741824'
export JAX_OPTIMIZATION_LEVEL=O1
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.9
export NCCL_NVLS_ENABLE=1
export CUDA_DEVICE_MAX_CONNECTIONS=1
export NEO_JAX_NUM_PROCESSES=8
export GREETING='it'"'"'s'

code=0
srun --kill-on-bad-exit=1 python -m neo_jax.train --config=configs/neo_9b.py --workdir=runs/neo-9b --config.mesh.num_devices=8 --config.mesh.fsdp=8 --config.stage.pretrain.accumulate=32 --config.stage.midtrain.accumulate=32 --config.stage.sft.accumulate=16 || code=$?
case "$code" in
  0|1|2|4) exit "$code" ;;
esac
if [ "${SLURM_RESTART_COUNT:-0}" -lt 20 ]; then
  echo "exit code $code: queued again"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
