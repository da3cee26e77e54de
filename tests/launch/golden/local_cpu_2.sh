#!/bin/bash
# neo-9b: 2 processes on this machine
export NEO_JAX_FLAGS=default
exec python -c 'import sys; from launch import local; sys.exit(local.run([sys.executable, "-m", "neo_jax.train", *sys.argv[1:]], 2))' --config=configs/neo_9b.py --workdir=runs/neo-9b --config.mesh.num_devices=2 --config.mesh.fsdp=2 --config.stage.pretrain.accumulate=128 --config.stage.midtrain.accumulate=128 --config.stage.sft.accumulate=64
