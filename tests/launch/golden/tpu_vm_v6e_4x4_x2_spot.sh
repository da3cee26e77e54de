#!/bin/bash
# neo-9b on v6e:4x4 x 2: 2 x v6e-16
set -u
log=neo-9b.log
give_back() {
  gcloud compute tpus queued-resources delete neo-9b --force --quiet --zone=us-east5-b
}
trap 'give_back; exit 130' INT TERM
{  # a group is read as a whole: no command can take the rest of the script from stdin
  for attempt in $(seq 0 20); do
    echo "attempt $attempt" | tee "$log"
    gcloud compute tpus queued-resources create neo-9b --node-count=2 --node-prefix=neo-9b --accelerator-type=v6e-16 --runtime-version=v2-alpha-tpuv6e --spot --zone=us-east5-b || exit 1
    unknown=0
    while true; do
      if state=$(gcloud compute tpus queued-resources describe neo-9b '--format=value(state.state)' --zone=us-east5-b); then unknown=0; else unknown=$((unknown + 1)); fi
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
      gcloud compute tpus tpu-vm ssh neo-9b-0 --worker=all '--command={ command -v gcsfuse >/dev/null || { echo deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -c -s) main | sudo tee /etc/apt/sources.list.d/gcsfuse.list && curl -sS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee /usr/share/keyrings/cloud.google.asc >/dev/null && sudo apt-get update -q && sudo apt-get install -q -y gcsfuse; }; } && { sudo mkdir -p /mnt/neo_jax/0 && { mountpoint -q /mnt/neo_jax/0 || sudo gcsfuse --implicit-dirs -o allow_other runs /mnt/neo_jax/0; }; } && { sudo docker run --rm --name=neo-9b --privileged --net=host --ipc=host --stop-timeout=300 --volume=/mnt/neo_jax/0:/workdir --env=NEO_JAX_FLAGS=default '"'"'--env=LIBTPU_INIT_ARGS=--xla_tpu_enable_latency_hiding_scheduler=true --xla_latency_hiding_scheduler_rerun=2 --xla_enable_async_all_gather=true --xla_tpu_scoped_vmem_limit_kib=98304 --xla_tpu_enable_data_parallel_all_reduce_opt=true --xla_tpu_data_parallel_opt_different_sized_ops=true --xla_tpu_enable_megascale_barrier=true --megascale_grpc_premap_memory_bytes=17179869184 --megascale_graph_hang_threshold=10m --megascale_error_reporter_abort_on_hang=true --megascale_error_reporter_abort_on_error=true'"'"' --env=TPU_MIN_LOG_LEVEL=0 --env=TPU_STDERR_LOG_LEVEL=0 --env=TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS=60 --env=TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES=256 --env=NEO_JAX_NUM_PROCESSES=8 registry.example/neo_jax:1 python -m neo_jax.train --config=configs/neo_9b.py --workdir=/workdir/neo-9b --config.mesh.num_devices=32 --config.mesh.num_slices=2 --config.mesh.data=2 --config.mesh.fsdp=16 --config.stage.pretrain.accumulate=8 --config.stage.midtrain.accumulate=8 --config.stage.sft.accumulate=4; echo neo_jax exit $?; }' --zone=us-east5-b 2>&1 | tee -a "$log" &
      gcloud compute tpus tpu-vm ssh neo-9b-1 --worker=all '--command={ command -v gcsfuse >/dev/null || { echo deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -c -s) main | sudo tee /etc/apt/sources.list.d/gcsfuse.list && curl -sS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee /usr/share/keyrings/cloud.google.asc >/dev/null && sudo apt-get update -q && sudo apt-get install -q -y gcsfuse; }; } && { sudo mkdir -p /mnt/neo_jax/0 && { mountpoint -q /mnt/neo_jax/0 || sudo gcsfuse --implicit-dirs -o allow_other runs /mnt/neo_jax/0; }; } && { sudo docker run --rm --name=neo-9b --privileged --net=host --ipc=host --stop-timeout=300 --volume=/mnt/neo_jax/0:/workdir --env=NEO_JAX_FLAGS=default '"'"'--env=LIBTPU_INIT_ARGS=--xla_tpu_enable_latency_hiding_scheduler=true --xla_latency_hiding_scheduler_rerun=2 --xla_enable_async_all_gather=true --xla_tpu_scoped_vmem_limit_kib=98304 --xla_tpu_enable_data_parallel_all_reduce_opt=true --xla_tpu_data_parallel_opt_different_sized_ops=true --xla_tpu_enable_megascale_barrier=true --megascale_grpc_premap_memory_bytes=17179869184 --megascale_graph_hang_threshold=10m --megascale_error_reporter_abort_on_hang=true --megascale_error_reporter_abort_on_error=true'"'"' --env=TPU_MIN_LOG_LEVEL=0 --env=TPU_STDERR_LOG_LEVEL=0 --env=TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS=60 --env=TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES=256 --env=NEO_JAX_NUM_PROCESSES=8 registry.example/neo_jax:1 python -m neo_jax.train --config=configs/neo_9b.py --workdir=/workdir/neo-9b --config.mesh.num_devices=32 --config.mesh.num_slices=2 --config.mesh.data=2 --config.mesh.fsdp=16 --config.stage.pretrain.accumulate=8 --config.stage.midtrain.accumulate=8 --config.stage.sft.accumulate=4; echo neo_jax exit $?; }' --zone=us-east5-b 2>&1 | tee -a "$log" &
      wait
    fi
    give_back
    if grep -qE 'neo_jax exit (1|2|4|125|126|127)$' "$log"; then
      exit 1  # a mistake, which another attempt would make again
    fi
    if [ "$(grep -c 'neo_jax exit 0$' "$log")" = 8 ]; then
      exit 0
    fi
  done
  exit 1
} </dev/null
