"""Self-contained HTML pages: markup from Python values, the house style, histograms, packed rows as pictures.

Used by `data_pipelines.inspect` and by the report of a run, `neo_jax.report`.
"""
