"""Load balancing of a learned mixture of experts (Switch Transformer, arXiv 2101.03961 eq. 4-6).

Of one layer, over the real tokens of a batch on all devices: f_e is the share of choices that fell on expert
e (each token makes k), P_e the mean probability of e, and

    loss = E * sum_e f_e * P_e

which is 1 if all experts are used alike, and E if every token is sure of the same k = 1. Layers are averaged.
`transformers` has the shares sum to k and averages f and P over layers before it multiplies; Shukor et al.
give the loss the weight 0.01.

It is a product of means. Like its gradient it is the same on any mesh and for any packing, but accumulated it
is the mean over parts, each weighted by its tokens: every part is balanced by itself. That differs from one
batch by E times the covariance of f and P between parts, as f of the whole is not known when the first part's
gradient is taken.
"""

import jax
import jax.numpy as jnp

from neo_jax.model.experts import Load


def balance(load: Load) -> jax.Array:
    """The loss times the tokens, float32: what is added over accumulation and divided by their number.

    `load` is [layers, E] of the batch.
    """
    layers, num_experts = load.tokens.shape
    share = load.tokens / jnp.maximum(load.tokens.sum(axis=-1, keepdims=True), 1.0)
    return num_experts * (share * load.probability).sum() / layers
