"""NEO-9B (arXiv 2510.14979): Qwen3-8B behind a pre-buffer of 6 new layers; stages as NEO-2B.

    python -m neo_jax.train --config=configs/neo_9b.py --workdir=DIR --config.data.path=DATA

`:smoke` and `:tiny` behind the file name give its small forms (configs/small.py). Where its numbers come from
and what is a guess: configs/neo_2b.py. 10.25 B parameters. The paper gives both sizes one recipe.
"""

from ml_collections import ConfigDict

from configs import backbones, base, neo_2b, small


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "", "smoke" or "tiny"."""
    c = base.get_config()
    c.name = "neo_9b"
    backbones.qwen3_8b(c.model)
    neo_2b.neo(c.model, pre_buffer=6)
    neo_2b.stages(c)
    return small.shrink(c, arg)
