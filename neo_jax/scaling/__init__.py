"""Scaling laws: from a table of runs to a law, from a law to the model and data for a budget.

    python -m neo_jax.scaling fit --results=runs/sweeps/quickstart --out=runs/sweeps/quickstart/scaling
    python -m neo_jax.scaling advise --preset=shukor_early_avg --flops=1e22

points.py reads the table; law.py and presets.py are the laws; parametric.py (approach 3), isoflop.py
(approach 2), frontier.py, groups.py (by source, by arm), mixtures.py (one law over all mixtures) and
heldout.py fit them; figures.py draws, page.py tells. None of it needs JAX, and a table from elsewhere will do
(--n, --d or --c, --loss name its columns).
"""
