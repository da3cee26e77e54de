"""A Fuyu of ours in stock transformers, and a stock one in ours."""

import json
import math

import jax
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from PIL import Image
from safetensors.numpy import load_file, save_file
from tokenizers import decoders, models, normalizers
from transformers.models.fuyu.image_processing_pil_fuyu import FuyuImageProcessorPil
from transformers.models.fuyu.processing_fuyu import FuyuProcessor

from configs import base
from data_pipelines import schema
from data_pipelines.resize import Resize
from neo_jax import decode, params as params_lib
from neo_jax.convert import fuyu, recordings, table
from neo_jax.convert.families import FAMILIES, recognise
from neo_jax.model.transformer import Transformer

SIDE, MAX_HW, NUM_NEW = 6, (24, 36), 16
PIECES = ["<unk>", "<s>", "|ENDOFTEXT|", "<0x04>", "|SPEAKER|", "|NEWLINE|", "\u2581", "\n"]
WORDS = [chr(code) for code in range(33, 127)]
PROMPT = "What is here?\n"


@pytest.fixture(scope="module")
def tokenizer():
    """Fuyu's form: Unigram over pieces of which the special ones always win, and a sign before every text."""
    scored = [(piece, 0.0) for piece in PIECES] + [(word, -1.0) for word in WORDS]
    made = tokenizers.Tokenizer(models.Unigram(scored, unk_id=0))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse()])
    made.add_special_tokens(["<s>"])
    return made


@pytest.fixture(scope="module")
def config(tokenizer):
    c = base.model()
    c.update_from_flattened_dict(
        fuyu.model_changes(
            {
                "vocab_size": tokenizer.get_vocab_size(),
                "hidden_size": 32,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "intermediate_size": 48,
                "patch_size": SIDE,
            }
        )
    )
    c.init_std = 0.3  # with smaller weights a random model says one token for ever
    return c


@pytest.fixture(scope="module")
def ours(config):
    """(unbound model, random parameters, biases and norms too)."""
    model = Transformer(config)
    specs = params_lib.abstract(model)
    params = jax.jit(lambda key: params_lib.init(specs, key))(jax.random.key(1))
    rng = np.random.default_rng(1)
    return model, {
        path: np.asarray(x) + (0 if specs[path].decays else rng.normal(0, 0.2, x.shape).astype(np.float32))
        for path, x in params.items()
    }


@pytest.fixture(scope="module")
def folder(config, ours, tokenizer, tmp_path_factory):
    """What an export writes."""
    folder = tmp_path_factory.mktemp("fuyu")
    special = {piece: tokenizer.token_to_id(piece) for piece in PIECES}
    files = fuyu.processor_files(config, MAX_HW)
    files["config.json"] = fuyu.hf_config(config, special, 0, 0)
    files["tokenizer_config.json"] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "|ENDOFTEXT|",
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    tokenizer.save(str(folder / "tokenizer.json"))
    tensors = table.to_hf(FAMILIES["fuyu"].table(config), ours[1])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def theirs(folder):
    model, report = transformers.FuyuForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    model.generation_config.eos_token_id = None
    return model.eval()


def picture(height, width, seed):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def squares(image):
    """Padded with 1 on the right and below to whole tokens, cut: uint8 [rows, cols, SIDE * SIDE * 3]."""
    height, width, _ = image.shape
    image = np.pad(image, ((0, -height % SIDE), (0, -width % SIDE), (0, 0)), constant_values=1)
    rows, cols = image.shape[0] // SIDE, image.shape[1] // SIDE
    return image.reshape(rows, SIDE, cols, SIDE, 3).swapaxes(1, 2).reshape(rows, cols, -1)


def inputs(tokenizer, images, text=PROMPT):
    """(ids, batch) of images and a prompt, laid out as Fuyu does (specs: Fuyu 4.2)."""
    patch, newline, start, answer = map(tokenizer.token_to_id, ("|SPEAKER|", "|NEWLINE|", "<s>", "<0x04>"))
    cut, ids = [squares(image) for image in images], []
    for image in cut:
        for row in image:
            ids += [patch] * len(row) + [newline]
        ids += [start, *tokenizer.encode(text).ids, answer]
    ids = np.array([ids])
    kinds = np.where(ids == patch, schema.PATCH, np.where(ids == newline, schema.SEPARATOR, schema.TEXT))
    pixels = np.concatenate([image.reshape(-1, SIDE * SIDE * 3) for image in cut])
    return ids, batch_of(ids, kinds, pixels)


def batch_of(ids, kinds, pixels):
    """Rows of one document, in which nothing is learnt; Fuyu reads no places of patches."""
    labels, one = np.full(ids.shape, recordings.IGNORED), np.ones(ids.shape, int)
    images = [[(pixels, np.zeros((len(pixels), 2), int))]]
    return recordings.token_table(ids, kinds, images, labels, segment_ids=one)


def normalised(batch, config):
    """Patches as transformers wants them: [1, P, SIDE * SIDE * 3]."""
    x = np.asarray(batch["patches"], np.float32).reshape(1, -1, SIDE * SIDE, 3) / 255
    x = (x - np.float32(config.embed.pixel_mean)) / np.float32(config.embed.pixel_std)
    return torch.from_numpy(x.reshape(1, -1, SIDE * SIDE * 3))


@pytest.mark.parametrize("sizes", [[(17, 30)], [(12, 13), (24, 36)]], ids=["one image", "two images"])
def test_logits_and_greedy_tokens(config, ours, theirs, tokenizer, sizes):
    images = [picture(*size, seed) for seed, size in enumerate(sizes)]
    ids, batch = inputs(tokenizer, images)
    bound = params_lib.bind(*ours)
    given = {"input_ids": torch.from_numpy(ids), "pixel_values": normalised(batch, config)}
    with torch.no_grad():
        expected = theirs(**given).logits.numpy()
    np.testing.assert_allclose(bound.logits(bound(batch)), expected, rtol=0, atol=1e-4)

    new = theirs.generate(**given, max_new_tokens=NUM_NEW, do_sample=False)[0, ids.shape[1] :].numpy()
    greedy = jax.jit(
        lambda params, batch: decode.greedy(
            params_lib.bind(ours[0], params),
            decode.read_prompts(params_lib.bind(ours[0], params), batch),
            stop_id=-1,  # none
            max_new_tokens=NUM_NEW,
        )
    )
    np.testing.assert_array_equal(greedy(ours[1], batch)[0], new)
    assert len(set(new.tolist())) > 3, "a model that repeats itself shows little"


def test_a_stock_model_is_read(config, tmp_path):
    """The other way round: transformers' own initialisation, its own files."""
    torch.manual_seed(0)
    sizes = fuyu.hf_config(config, {"|SPEAKER|": 4}, 0, 0)
    stock = transformers.FuyuForCausalLM(transformers.FuyuConfig(**sizes)).eval()
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    stock.save_pretrained(tmp_path)
    hf = json.loads((tmp_path / "config.json").read_text())
    family = FAMILIES[recognise(hf)]
    read = base.model()
    read.update_from_flattened_dict(family.model_changes(hf))
    model = Transformer(read)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors = {family.canonical(name): x for name, x in tensors.items()}
    params = table.from_hf(params_lib.abstract(model), family.table(read), tensors)
    rng = np.random.default_rng(0)
    ids = np.concatenate([np.full((1, 5), 4), rng.integers(5, read.vocab_size, (1, 9))], axis=1)
    kinds = np.where(ids == 4, schema.PATCH, schema.TEXT)
    pixels = rng.integers(0, 256, (5, SIDE * SIDE * 3)).astype(np.uint8)
    batch = batch_of(ids, kinds, pixels)
    with torch.no_grad():
        expected = stock(input_ids=torch.from_numpy(ids), pixel_values=normalised(batch, read)).logits
    bound = params_lib.bind(model, params)
    np.testing.assert_allclose(bound.logits(bound(batch)), expected.numpy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [(17, 30), (24, 7)], ids=str)
def test_processor(folder, config, tokenizer, size):
    """The folder's AutoProcessor gives the ids and pixels that we lay out.

    Its parts are called one by one, in the order of its __call__: without torchvision, transformers 5.24
    hands torch tensors to the NumPy image processor there, which cannot cut them. Called as a whole with
    torch 2.14.1 and torchvision 0.29.1, it gave the same ids and pixels for the same images.
    """
    processor = transformers.AutoProcessor.from_pretrained(folder)
    assert isinstance(processor, FuyuProcessor)
    image = picture(*size, seed=3)
    [[resized]] = processor.image_processor([Image.fromarray(image)], return_tensors="np")["images"]
    whole = [math.ceil(length / SIDE) * SIDE for length in size]
    cut = np.asarray(resized)[None, :, : whole[0], : whole[1]]
    patches = processor.image_processor.patchify_image(cut)
    ids, batch = inputs(tokenizer, [image])
    np.testing.assert_allclose(
        np.asarray(patches).reshape(-1, SIDE * SIDE * 3), normalised(batch, config)[0].numpy(), atol=1e-6
    )
    row = whole[1] // SIDE
    placeholders = processor.replace_image_token({}, 0, num_patches=len(batch["patches"][0]), row_width=row)
    before, _, after = (placeholders + PROMPT + "<0x04>").partition("<s>")
    found = processor.tokenizer(before + "<s>", add_special_tokens=False)["input_ids"][1:]
    found += processor.tokenizer(after, add_special_tokens=False)["input_ids"]
    np.testing.assert_array_equal(found, ids[0])


@pytest.mark.parametrize("size", [(1080, 1920), (1200, 900), (90, 2500), (31, 59)], ids=str)
def test_an_import_sees_images_as_large_as_the_published_model(size):
    theirs = FuyuImageProcessorPil()([Image.new("RGB", size[::-1])], return_tensors="np")
    family, side = FAMILIES["fuyu"], FuyuImageProcessorPil().patch_size.height
    plan = Resize(family.data["resize"], side, *family.pixels({})).plan(*size)
    assert plan.height == theirs["image_unpadded_heights"][0][0]
    assert plan.width == theirs["image_unpadded_widths"][0][0]
