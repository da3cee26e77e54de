"""One self-contained HTML page about a run: python -m neo_jax.report --workdir=DIR

run.py reads the workdir; summary.py and results.py say what is shown and in which words; charts.py draws
curves; data_pipelines/page draws packed rows and makes it one page that needs no network and no server.
"""
