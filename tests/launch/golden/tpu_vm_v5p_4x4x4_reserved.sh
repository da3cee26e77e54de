#!/bin/bash
# neo-9b on v5p:4x4x4: 1 x v5p-128
set -u
log=neo-9b.log
give_back() {
  gcloud compute tpus queued-resources delete neo-9b --force --quiet --zone=us-east5-a --project=lab
}
trap 'give_back; exit 130' INT TERM
{  # a group is read as a whole: no command can take the rest of the script from stdin
  for attempt in $(seq 0 20); do
    echo "attempt $attempt" | tee "$log"
    gcloud alpha compute tpus queued-resources create neo-9b --node-id=neo-9b --accelerator-type=v5p-128 --runtime-version=v2-alpha-tpuv5 --reservation=res-1 --zone=us-east5-a --project=lab || exit 1
    unknown=0
    while true; do
      if state=$(gcloud compute tpus queued-resources describe neo-9b '--format=value(state.state)' --zone=us-east5-a --project=lab); then unknown=0; else unknown=$((unknown + 1)); fi
      if [ "$unknown" = 10 ]; then
        echo "gave up: gcloud failed 10 times in a row to tell the state of neo-9b" >&2
        give_back
        exit 1
      fi
      case "$state" in
        ACTIVE|FAILED|SUSPENDED|SUSPENDING) break ;;
      esac
      sleep 30
    done
    if [ "$state" = ACTIVE ]; then
      gcloud compute tpus tpu-vm ssh neo-9b --worker=all '--command={ sudo gcloud auth configure-docker us-docker.pkg.dev --quiet; } && { sudo docker run --rm --name=neo-9b --privileged --net=host --ipc=host --stop-timeout=300 --volume=/mnt/nfs:/workdir --env=NEO_JAX_FLAGS=default '"'"'--env=LIBTPU_INIT_ARGS=--xla_tpu_enable_latency_hiding_scheduler=true --xla_latency_hiding_scheduler_rerun=2 --xla_enable_async_all_gather=true --xla_tpu_scoped_vmem_limit_kib=65472'"'"' --env=TPU_MIN_LOG_LEVEL=0 --env=TPU_STDERR_LOG_LEVEL=0 --env=TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS=60 --env=TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES=256 --env=NEO_JAX_NUM_PROCESSES=16 us-docker.pkg.dev/p/r/neo_jax:1 python -m neo_jax.train --config=configs/neo_9b.py --workdir=/workdir/neo-9b --config.mesh.num_devices=64 --config.mesh.fsdp=64 --config.stage.pretrain.accumulate=4 --config.stage.midtrain.accumulate=4 --config.stage.sft.accumulate=2; echo neo_jax exit $?; }' --zone=us-east5-a --project=lab 2>&1 | tee -a "$log" &
      wait
    fi
    give_back
    if grep -qE 'neo_jax exit (1|2|4|125|126|127)$' "$log"; then
      exit 1  # a mistake, which another attempt would make again
    fi
    if [ "$(grep -c 'neo_jax exit 0$' "$log")" = 16 ]; then
      exit 0
    fi
  done
  exit 1
} </dev/null
