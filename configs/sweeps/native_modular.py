"""A small language model learns to see: all of it trains, or only what stands in front of it, or it was never
trained on language.

python -m neo_jax.train --config=configs/sweeps/native_modular.py:language --workdir=runs/sweeps/language
python -m neo_jax.sweep run --config=configs/sweeps/native_modular.py --workdir=runs/sweeps/native_modular

The first trains the language model, on the captions of the data that `make data/quickstart` builds.
"""

from ml_collections import ConfigDict, FrozenConfigDict

from configs import base
from configs.sweeps import quickstart
from neo_jax.sweep import cells, grids

SIZE = "w32"  # a pre-buffer layer in front of two layers, which are those of the language model
LANGUAGE = "runs/sweeps/language"
STEPS = (75, 300)


def language() -> ConfigDict:
    c = quickstart.one_size(SIZE, steps=300)
    c.name = "language"
    c.model.num_layers, c.model.pre_buffer = c.model.num_layers - c.model.pre_buffer, 0
    c.model.embed.kind, c.model.coords.kind, c.model.mask = "none", "1d", "causal"
    for name, split in {"captions": "train", "held_out": "dev"}.items():
        c.data.sources[name] = base.source(
            "drawings", f"{c.data.path}/{split}/*.array_record", split=split, form="text"
        )
    c.data.tokenizer = f"{c.data.path}/tokenizer.json"
    return c


def model() -> ConfigDict:
    c = quickstart.one_size(SIZE, steps=STEPS[-1])
    c.init = LANGUAGE
    # Captions as the language model knows them: whole, and with all their words to see.
    c.stage.full.tags_share, c.stage.full.parallel_share = 1.0, 0.0
    return c


def get_sweep() -> list[cells.Cell]:
    lengths = cells.axis("stage.full.steps", STEPS, "s")
    fresh = cells.product([cells.Change("scratch", {"init": ""}, arm="scratch")], lengths)
    return [*grids.native_and_modular(model(), lengths), *cells.build(model(), fresh)]


def get_config(name: str) -> ConfigDict | FrozenConfigDict:
    return language() if name == "language" else cells.find(get_sweep(), name)
