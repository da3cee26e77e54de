"""Exported folders in transformers: their PyTorch files compute what our JAX model computes."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from PIL import Image
from transformers.dynamic_module_utils import get_imports

from data_pipelines import schema, text
from neo_jax import config as config_lib, params as params_lib
from neo_jax.convert.__main__ import main
from neo_jax.convert.export import IN_TRANSFORMERS, export
from neo_jax.model.transformer import Transformer

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
NEW_TOKENS = 16
# Names of every family's special tokens; the vocabulary is the same for all.
SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<IMG_CONTEXT>", "<img>", "</img>"),
    *("<s>", "</s>", "<unk>", "<vision>", "</vision>", "<vpatch>", "<vrow_sep>"),
)


def tiny_forms():
    """name -> config; of experiments that are the same in small (NEO's sizes), the first."""
    found = {}
    for file in sorted(CONFIGS.glob("*_*b.py")):
        config = config_lib.load(f"{file}:tiny")
        if not any((config.model, config.data) == (other.model, other.data) for other in found.values()):
            found[file.stem] = config
    return found


TINY = tiny_forms()
OURS = [name for name, config in TINY.items() if config.family not in IN_TRANSFORMERS]


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory):
    words = ["the quick brown fox jumps over a lazy dog: what is shown here? " * 3]
    trained = text.train_tokenizer(words, 400)
    tokenizer = tokenizers.Tokenizer.from_str(trained)
    tokenizer.add_special_tokens(list(SPECIAL))
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(file))
    return file


def write(folder, config, params, tokenizer_file):
    tokenizer = text.Tokenizer(tokenizer_file, config.data.special_tokens)
    export(folder, config, config.stage[config.stages[-1]], jax.device_get(params).__getitem__, tokenizer)


def exported(config, tokenizer_file, folder):
    """A random model of a config, and its exported folder loaded by transformers."""
    model = Transformer(config.model)
    specs = params_lib.abstract(model)
    params = jax.jit(lambda key: params_lib.init(specs, key))(jax.random.key(3))
    # Norms and biases start at ones and zeros; a mix-up of two would not show.
    keys = dict(zip(sorted(params), jax.random.split(jax.random.key(4), len(params)), strict=True))
    params = {
        path: x if specs[path].decays else x + 0.3 * jax.random.normal(keys[path], x.shape)
        for path, x in params.items()
    }
    write(folder, config, params, tokenizer_file)
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    return params_lib.bind(model, params), loaded.eval(), processor


def as_batch(inputs):
    """The processor's output for one prompt as a batch of our model."""
    batch = {name: np.asarray(inputs[name]) for name in ("kinds", "image_ids")}
    batch["tokens"], batch["coords"] = np.asarray(inputs["input_ids"]), np.asarray(inputs["coords"])
    is_patch = batch["kinds"] == schema.PATCH
    batch["patch_index"] = np.where(is_patch, np.cumsum(is_patch, axis=1) - 1, -1)
    batch["segment_ids"] = np.ones_like(batch["tokens"])
    batch["loss_weights"] = np.zeros(batch["tokens"].shape, np.float32)
    batch = {name: x.astype(np.int32) if x.dtype == np.int64 else x for name, x in batch.items()}
    batch["patches"] = np.asarray(inputs["patches"])[None]
    batch["patch_hw"] = np.asarray(inputs["patch_hw"])[None].astype(np.int32)
    return {name: jnp.asarray(x) for name, x in batch.items()}


def pictures():
    rng = np.random.default_rng(0)
    sizes = [(40, 90), (61, 50)]
    return [Image.fromarray(rng.integers(0, 256, (*size, 3)).astype(np.uint8)) for size in sizes]


@pytest.mark.parametrize("name", OURS)
def test_transformers_computes_what_we_compute(name, tokenizer_file, tmp_path):
    config = TINY[name]
    ours, theirs, processor = exported(config, tokenizer_file, tmp_path / "hf")
    needed = {package for file in (tmp_path / "hf").glob("*.py") for package in get_imports(file)}
    needed -= sys.stdlib_module_names
    assert needed <= {"numpy", "PIL", "tokenizers", "torch", "transformers"}, "what its README says"
    prompt = "<image>the fox<image>what is shown here?"
    inputs = processor(text=prompt, images=pictures(), return_tensors="pt")
    batch = as_batch(inputs)
    with torch.no_grad():
        logits = theirs(**inputs).logits.numpy()
    hidden, caches = jax.jit(lambda batch: ours.prefill(batch, inputs["kinds"].shape[1] + NEW_TOKENS))(batch)
    np.testing.assert_allclose(logits, ours.logits(hidden), rtol=0, atol=1e-4)

    tokens = theirs.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)
    new = tokens[0, inputs["input_ids"].shape[1] :].numpy()
    assert len(new) == NEW_TOKENS
    np.testing.assert_array_equal(new, greedy(ours, batch, hidden, caches))


@pytest.mark.parametrize("name", sorted(TINY))
def test_exported_again_is_the_same_bytes(name, tokenizer_file, tmp_path):
    config, first, second = TINY[name], tmp_path / "first", tmp_path / "second"
    model = Transformer(config.model)
    specs = params_lib.abstract(model)
    params = jax.jit(lambda key: params_lib.init(specs, key))(jax.random.key(0))
    write(first, config, params, tokenizer_file)
    main(["import", f"--hf={first}", f"--out={tmp_path / 'run'}"])
    main(["export", f"--workdir={tmp_path / 'run'}", f"--out={second}"])
    assert sorted(path.name for path in first.iterdir()) == sorted(path.name for path in second.iterdir())
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


def test_stock_fuyu_loads_an_exported_folder(tokenizer_file, tmp_path):
    """The command's folder, without code of ours; test_convert_fuyu.py compares the numbers."""
    config = TINY["fuyu_8b"]
    specs = params_lib.abstract(Transformer(config.model))
    params = jax.jit(lambda key: params_lib.init(specs, key))(jax.random.key(0))
    write(tmp_path / "hf", config, params, tokenizer_file)
    assert not list((tmp_path / "hf").glob("*.py"))
    model, info = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert type(model) is transformers.FuyuForCausalLM
    assert not info["missing_keys"] and not info["unexpected_keys"]
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "hf")
    assert type(processor) is transformers.FuyuProcessor


def greedy(ours, batch, hidden, caches):
    """NEW_TOKENS likeliest tokens after a prompt, with our cache."""
    length = batch["tokens"].shape[1]
    last, new = batch["coords"][0, -1], []
    extend = jax.jit(ours.extend)
    for step in range(NEW_TOKENS):
        token = jnp.argmax(ours.logits(hidden[:, -1]), axis=-1).astype(jnp.int32)
        new.append(int(token[0]))
        t = jnp.ceil(last.max()) + 1 + step
        three = [t, t, t] if (last[1:] > 0).all() and last[0] == last[1] else [t, 0, 0]
        coords = jnp.asarray(three, jnp.float32)[None, None]
        hidden, caches = extend(token[:, None], coords, jnp.asarray([[length + step]], jnp.int32), caches)
    return new
