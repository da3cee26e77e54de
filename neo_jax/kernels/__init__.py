"""Attention kernels, each a drop-in for `reference` in neo_jax/model/attention.py and tested against it."""
