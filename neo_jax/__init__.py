"""neo_jax: pretraining of native vision-language models, one transformer over raw image patches and words."""

__version__ = "0.1.0"
