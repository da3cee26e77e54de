"""The quickstart in 28 languages: the same drawings, captions drawn from every locale.

python -m neo_jax.train --config=configs/quickstart_multilingual.py --workdir=runs/quickstart_multilingual
"""

from ml_collections import ConfigDict

from configs import quickstart

# fmt: off
LOCALES = (
    "en", "bn", "da", "de", "en-gb", "es", "es-mx", "et", "fi", "fr", "hi", "hu", "it", "ja", "ko", "lt",
    "ms", "nb", "nl", "pl", "pt", "ru", "sv", "th", "uk", "vi", "zh", "zh-hant",
)
# fmt: on


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "", "smoke" or "tiny"."""
    c = quickstart.get_config(arg)
    c.name = "quickstart_multilingual"
    c.data.path = "data/quickstart_multilingual"
    c.data.locales = LOCALES
    c.data.vocab_size = c.model.vocab_size = 8192  # other scripts need more pieces
    for name in c.stages:
        c.stage[name].row_tokens = 384
        c.stage[name].row_patches = 144
        c.stage[name].batch_size = max(1, c.stage[name].batch_size // 2)
    return c
