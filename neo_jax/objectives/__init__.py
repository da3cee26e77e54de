"""Objectives, one file per kind. A stage minimises a weighted sum of them (config.stage.*.objectives).

`ntp` (next-token prediction) is a function of the final hidden states, `balance` one of the choices that the
routers of learned experts make; neither has parameters. Every other kind is a head: a module whose parameters
are part of the model while it trains (`objectives/NAME/...`), with

    layers                    where it taps the residual stream (Transformer.taps)
    loss(batch, taps, stage)  a sum, float32 scalar
    weight(batch, stage)      what the sum is to be divided by; a function of the batch alone
    vectors(batch, stage)     how many vectors pass through its matrices

Sums and weights are added over accumulation and hosts before they are divided. Inference builds `Transformer`
alone and reads none of the heads' parameters; export writes them where the family has names for them.
"""

from flax import nnx
from ml_collections import ConfigDict

from neo_jax.model.transformer import Transformer
from neo_jax.objectives.distill import Distill

HEADS = {"distill": Distill}


class Heads(nnx.Module):
    """The heads that a config's stages ask for, by name."""

    def __init__(self, config: ConfigDict, names: tuple[str, ...]):
        self.names = names
        for name in names:
            setattr(self, name, HEADS[name](config))

    def of(self, stage: ConfigDict) -> dict[str, Distill]:
        """The heads that one stage uses, by name."""
        return {name: getattr(self, name) for name in self.names if active(stage, name)}


def active(stage: ConfigDict, name: str) -> bool:
    """Whether a stage trains with an objective."""
    return stage.objectives.get(name, 0.0) > 0


def build(config: ConfigDict) -> Transformer:
    """The model of a whole config as it is trained, with the heads of its objectives; see params.bind."""
    model = Transformer(config.model)
    names = tuple(name for name in HEADS if any(active(config.stage[stage], name) for stage in config.stages))
    if names:
        model.objectives = Heads(config, names)
    return model
