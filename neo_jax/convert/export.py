"""Our checkpoints as folders in Hugging Face's layout."""

import json
import pathlib
import shutil
from collections.abc import Mapping

import numpy as np
from ml_collections import ConfigDict
from safetensors import numpy as safetensors

from data_pipelines.text import SPECIAL_TOKENS, Tokenizer
from neo_jax.convert import table
from neo_jax.convert.families import FAMILIES


def export(
    folder: pathlib.Path,
    family_name: str,
    model: ConfigDict,
    params: Mapping[str, np.ndarray],
    tokenizer_file: pathlib.Path,
    min_pixels: int,
    max_pixels: int,
) -> None:
    """Writes config.json, model.safetensors and tokenizer.json; the folder appears whole or not at all."""
    family, tokenizer = FAMILIES[family_name], Tokenizer(tokenizer_file)
    special = {name: tokenizer.special_id(name) for name in SPECIAL_TOKENS}
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    config = family.hf_config(model, special, min_pixels, max_pixels)
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = table.to_hf(family.table(model), params)
    safetensors.save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(tokenizer_file, partial / "tokenizer.json")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
