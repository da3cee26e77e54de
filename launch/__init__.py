"""From one Job to the files that run it: GKE (JobSet), SLURM, TPU VMs, this machine."""
