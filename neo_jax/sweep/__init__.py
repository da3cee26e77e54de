"""Sweeps: a Python file says which configs, one command runs them, one table holds what came out.

    python -m neo_jax.sweep run --config=configs/sweeps/quickstart.py --workdir=runs/sweeps/quickstart

cells.py combines changes of a config into named cells; grids.py builds the grids of scaling-law work from it;
local.py runs the cells on this machine; table.py gathers their results. A sweep file has two functions:
`get_sweep()` returns cells, `get_config(name)` one cell's config, so that every cell is an ordinary run,
`--config=SWEEP.py:NAME`.
"""
