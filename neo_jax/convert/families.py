"""The families of checkpoints we know, and which of them a config.json is of."""

from collections.abc import Mapping
from typing import Any

from neo_jax.convert.backbones import BACKBONES
from neo_jax.convert.breen import BREEN
from neo_jax.convert.eve import EVE
from neo_jax.convert.evev2 import EVEV2
from neo_jax.convert.fuyu import FUYU
from neo_jax.convert.hovle import HOVLE
from neo_jax.convert.mono_internvl import MONO_INTERNVL
from neo_jax.convert.neo import NEO
from neo_jax.convert.solo import SOLO
from neo_jax.convert.table import Family
from neo_jax.errors import UserError

# Native models first, by what their config.json holds; then plain language models, by their model_type.
FAMILIES: dict[str, Family] = {
    "neo": NEO,
    "eve": EVE,
    "evev2": EVEV2,
    "solo": SOLO,
    "fuyu": FUYU,
    "mono_internvl": MONO_INTERNVL,
    "hovle": HOVLE,
    "breen": BREEN,
    **BACKBONES,
}


def recognise(hf: Mapping[str, Any]) -> str:
    """The name of the family that a config.json belongs to.

    Raises:
        UserError: it belongs to none.
    """
    exported = hf.get("neo_jax")
    if isinstance(exported, Mapping) and exported.get("family") in FAMILIES:
        return exported["family"]
    for name, family in FAMILIES.items():
        if family.matches(hf):
            return name
    raise UserError(
        f"config.json: no known family (model_type {hf.get('model_type')!r}, architectures "
        f"{hf.get('architectures')!r}); there are {', '.join(FAMILIES)}"
    )
