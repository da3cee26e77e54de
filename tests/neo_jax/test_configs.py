"""Every experiment in configs/: published parameter counts, what each stage trains, one step of each."""

import itertools
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch
import transformers
from jax.sharding import AbstractMesh

from configs import backbones, base
from data_pipelines import schema
from data_pipelines.loader import train_loader
from neo_jax import (
    config as config_lib,
    mesh as mesh_lib,
    metrics,
    params as params_lib,
    stages as stages_lib,
    step as step_lib,
)
from neo_jax.model.transformer import Transformer
from tests.neo_jax import families
from tests.neo_jax.families import CONFIGS, FAMILIES, load

SAME_WHEN_SMALL = ("neo_9b", "neo_ov_2b")  # as neo_2b
QUICKSTARTS = ("quickstart", "quickstart_multilingual", "web")


def specs_of(config):
    return params_lib.abstract(Transformer(config.model))


def count(specs, pattern=".*"):
    return params_lib.count({path: spec for path, spec in specs.items() if re.fullmatch(pattern, path)})


def billions(specs, digits, pattern=".*"):
    return round(count(specs, pattern) / 1e9, digits)


def test_every_config_is_known_here():
    text = {file.stem: file.read_text() for file in CONFIGS.glob("*.py")}
    found = {name for name in text if re.search(r"^def get_config\(arg", text[name], re.MULTILINE)}
    assert found == {*FAMILIES, *QUICKSTARTS}


# Parameters without the patch embedding, as the models' cards have them.
BACKBONES = {
    "qwen3_1p7b": 1_720_574_976,
    "qwen3_8b": 8_190_735_360,
    "qwen2p5_7b": 7_615_616_512,
    "mistral_7b": 7_241_732_096,
    "llama2_7b": 6_738_415_616,
    "internlm2_1p8b": 1_889_110_016,
}


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones_have_the_published_sizes(name):
    model = base.model()
    getattr(backbones, name)(model)
    assert count(params_lib.abstract(Transformer(model)), "(?!patch_embed/).*") == BACKBONES[name]


def test_neo_has_the_published_sizes():
    """specs: parameters of a layer exactly; of the whole model, untied and tied, as rounded there."""
    for name, layers, per_layer, digits, untied, tied in (
        ("neo_2b", 40, 56_627_712, 3, 2.897, 2.585),
        ("neo_9b", 42, 213_918_208, 2, 10.25, 9.62),
        ("neo_ov_2b", 40, 56_627_712, 3, 2.897, 2.585),
    ):
        specs = specs_of(load(name))
        assert count(specs, "(layers|pre_buffer)/.*") == layers * per_layer
        assert billions(specs, digits) == untied
        assert billions(specs, digits, "(?!head).*") == tied


def test_solo_has_the_published_size():
    """7.26 B, rounded; the projection is 3072 x 4096."""
    specs = specs_of(load("solo_7b"))
    assert billions(specs, 2) == 7.26
    assert count(specs, "patch_embed/.*") == 3072 * 4096


def test_eve_has_the_published_sizes():
    """6.74 B, and in front of it 9.0 M and 21.0 M, rounded."""
    specs = specs_of(load("eve_7b"))
    assert billions(specs, 2, "(?!patch_embed/).*") == 6.74
    projector = count(specs, "patch_embed/(up|out)/.*")
    assert round(projector / 1e6, 1) == 21.0
    assert round((count(specs, "patch_embed/.*") - projector) / 1e6, 1) == 9.0


def test_evev2_has_the_published_size():
    """14,156,712,960 exactly; 15.5 M of them embed patches."""
    specs = specs_of(load("evev2_7b"))
    assert count(specs) == 14_156_712_960
    assert round(count(specs, "patch_embed/.*") / 1e6, 1) == 15.5
    assert billions(specs, 2, "layers/.*/visual/.*") == billions(specs, 2, "layers/.*/text/.*") == 6.53


def test_fuyu_has_as_many_parameters_as_in_transformers():
    specs = specs_of(load("fuyu_8b"))
    assert billions(specs, 2) == 9.41
    with torch.device("meta"):
        theirs = transformers.FuyuForCausalLM(transformers.FuyuConfig())
    assert count(specs) == sum(p.numel() for p in theirs.parameters())


def test_mono_internvl_has_the_published_sizes():
    """3.11 B, rounded; "1.8 B" of them used by a token is its language model, 1.89 B with word embeddings."""
    specs = specs_of(load("mono_internvl_2b"))
    assert billions(specs, 2) == 3.11
    assert billions(specs, 2, "(?!patch_embed/)(?!.*/visual/).*") == 1.89


def test_hovle_has_the_published_size():
    """The index of its files counts 10,425,311,232 bytes of float32, in two parts that nothing reads:

    the language model's own word embeddings, and a class vector with its position.
    """
    config = load("hovle_2b")
    unread = config.model.vocab_size * config.model.hidden_size + 2 * config.model.embed.hidden_size
    assert 4 * (count(specs_of(config)) + unread) == 10_425_311_232


def test_breen_has_an_image_network_beside_qwen():
    """Its size is unpublished: what is known is its parts."""
    config = load("breen_7b")
    specs, model = specs_of(config), config.model
    assert count(specs, "(?!patch_embed/)(?!.*/visual/).*") == BACKBONES["qwen2p5_7b"]
    assert count(specs, ".*/visual/.*") == model.num_layers * 3 * model.hidden_size * model.mlp_size
    assert count(specs, "patch_embed/slots/.*") == 160 * model.hidden_size


# What each stage trains, path by path: not the patterns of the config. {a,b} stands for either.
EVERYTHING = None
LAYER = "{attention_norm,mlp_norm}/weight attention/{o,qkv/{q,k,v}}/weight mlp/{gate,up,down}/weight"
NEO_LAYER = LAYER + " attention/qkv/{q_hw,k_hw,{q,k}_norm,{q,k}_norm_h,{q,k}_norm_w}/weight"
CONVOLUTIONS = "patch_embed/{patch,merge}/{weight,bias}"
EVE_EMBED = (
    "patch_embed/patch/weight patch_embed/{class,row}_vector patch_embed/{up,out}/{weight,bias} "
    "patch_embed/{local,over_image}/{{q,kv}_norm/{weight,bias},{q,k,v}/weight,o/{weight,bias}}"
)
UNSHUFFLE = "patch_embed/{patch,up,out}/{weight,bias} patch_embed/positions"
EVEV2_VISUAL = (
    f"{CONVOLUTIONS} patch_embed/slots/vectors layers/{{attention_norm,mlp_norm}}/visual/weight "
    "layers/attention/{o/visual/weight,qkv/visual/{q,k,v}/{weight,bias}} "
    "layers/mlp/visual/{gate,up,down}/weight"
)
MONO_VISUAL = f"{UNSHUFFLE} patch_embed/norm/{{weight,bias}} layers/mlp/visual/{{gate,up,down}}/weight"
HOVLE_EMBEDDING = f"token_embed {UNSHUFFLE} " + " ".join(f"pre_buffer/{path}" for path in LAYER.split())
NEO_PRETRAIN = (
    f"{CONVOLUTIONS} layers/attention/qkv/{{q_hw,k_hw,{{q,k}}_norm_h,{{q,k}}_norm_w}}/weight "
    + " ".join(f"pre_buffer/{path}" for path in NEO_LAYER.split())
)
TRAINED = {
    **{
        (name, stage): NEO_PRETRAIN if stage == "pretrain" else EVERYTHING
        for name in ("neo_2b", "neo_9b", "neo_ov_2b")
        for stage in ("pretrain", "midtrain", "sft")
    },
    **{("solo_7b", stage): EVERYTHING for stage in ("classes", "web", "anneal", "sft")},
    ("eve_7b", "prealign"): EVE_EMBED,
    ("eve_7b", "pretrain"): EVERYTHING,
    ("eve_7b", "sft"): EVERYTHING,
    ("evev2_7b", "prealign"): f"{CONVOLUTIONS} patch_embed/slots/vectors",
    ("evev2_7b", "visual"): EVEV2_VISUAL,
    ("evev2_7b", "visual_hd"): EVEV2_VISUAL,
    ("evev2_7b", "full"): EVERYTHING,
    ("evev2_7b", "sft"): EVERYTHING,
    ("fuyu_8b", "sft"): EVERYTHING,
    ("mono_internvl_2b", "concepts"): MONO_VISUAL,
    ("mono_internvl_2b", "semantics"): MONO_VISUAL,
    ("mono_internvl_2b", "alignment"): f"{MONO_VISUAL} layers/attention/{{o,qkv/{{q,k,v}}}}/weight",
    ("mono_internvl_2b", "sft"): EVERYTHING,
    ("hovle_2b", "embedding"): HOVLE_EMBEDDING,
    ("hovle_2b", "alignment"): HOVLE_EMBEDDING,
    ("hovle_2b", "sft"): EVERYTHING,
    ("breen_7b", "prealign"): (
        f"{CONVOLUTIONS} patch_embed/slots/vectors layers/mlp/visual/{{gate,up,down}}/weight"
    ),
    ("breen_7b", "pretrain"): EVERYTHING,
    ("breen_7b", "sft"): EVERYTHING,
    ("quickstart", "align"): f"{CONVOLUTIONS} token_embed head "
    + " ".join(f"pre_buffer/{path}" for path in NEO_LAYER.split()),
    ("quickstart", "full"): EVERYTHING,
}
TRAINED |= {
    (name, stage): TRAINED["quickstart", stage]
    for name in ("quickstart_multilingual", "web")
    for stage in ("align", "full")
}


def expand(paths):
    """All paths that a list with {a,b} stands for."""
    inner = re.search(r"{([^{}]*)}", paths)
    if not inner:
        return {paths}
    choices = (paths[: inner.start()] + choice + paths[inner.end() :] for choice in inner[1].split(","))
    return set(itertools.chain.from_iterable(map(expand, choices)))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_mesh_divides_every_weight(name):
    config = load(name)
    mesh = AbstractMesh(tuple(config.mesh[axis] for axis in mesh_lib.AXES), mesh_lib.AXES)
    assert mesh_lib.param_shardings(mesh, specs_of(config)).keys() == specs_of(config).keys()


@pytest.mark.parametrize("form", ["", ":smoke"])
@pytest.mark.parametrize("name", FAMILIES + QUICKSTARTS)
def test_stages_train_exactly_what_they_say(name, form):
    config = load(name + form)
    specs = specs_of(config)
    assert {stage for family, stage in TRAINED if family == name} == set(config.stages)
    for stage in config.stages:
        wanted = TRAINED[name, stage]
        paths = set(specs) if wanted is EVERYTHING else set().union(*map(expand, wanted.split()))
        assert params_lib.select(specs, config.stage[stage].trainable) == paths, stage


@pytest.mark.parametrize("name", FAMILIES)
def test_small_forms_keep_the_kinds(name):
    """Every field of the model that is not a size, and the order of the stages."""
    whole, tiny, smoke = load(name), load(f"{name}:tiny"), load(f"{name}:smoke")
    sizes = {"vocab_size", "hidden_size", "num_layers", "pre_buffer", "num_heads", "num_kv_heads", "head_dim"}
    sizes |= {"mlp_size", "init_std", "dtype", "sliding_window", "patch_size", "merge_size", "tile_size"}
    sizes |= {"visual_share"}

    def kinds(config):
        flat = {**config.model, **config.model.embed, **config.model.coords, **config.model.route}
        sections = {"embed", "coords", "route"}
        return {field: value for field, value in flat.items() if field not in sizes | sections}

    assert kinds(tiny) == kinds(smoke) == kinds(whole)
    assert smoke.model == tiny.model and smoke.stages == whole.stages
    assert smoke.data.layout == whole.data.layout and smoke.data.resize == whole.data.resize
    assert all(smoke.stage[stage].layout == whole.stage[stage].layout for stage in whole.stages)
    assert bool(tiny.model.route.visual_share) == bool(whole.model.route.visual_share)
    for field in ("pre_buffer", "sliding_window"):
        assert bool(tiny.model[field]) == bool(whole.model[field])
    assert (tiny.model.num_heads == tiny.model.num_kv_heads) == (
        whole.model.num_heads == whole.model.num_kv_heads
    )


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in SAME_WHEN_SMALL])
def test_a_step_of_the_first_stage(name):
    """On random rows: a finite loss, all that trains moves, everything else stays bit for bit."""
    config = load(f"{name}:smoke")
    model, rng = Transformer(config.model), np.random.default_rng(0)
    specs = params_lib.abstract(model)
    stage = stages_lib.plan(config)[0]
    trainable = params_lib.select(specs, stage.config.trainable)
    params = jax.jit(lambda key: params_lib.init(specs, key))(jax.random.key(0))
    before = {path: np.asarray(value) for path, value in params.items()}
    state = step_lib.initial_state(params, specs, stage, trainable)
    rows = [[families.document(config, rng, ((2, 3),), (3, 4))] for _ in range(2)]
    batch = families.stack(config, rows)
    train_step = jax.jit(step_lib.make_train_step(model, specs, stage, trainable, 1))
    state, first = train_step(state, batch)  # the rate of the first step of a warm-up is 0
    state, second = train_step(state, batch)
    assert np.isfinite(first["loss"]) and np.isfinite(second["grad_norm"]) and second["grad_norm"] > 0
    assert second["misrouted_tokens"] == 0 and second["nonfinite_steps"] == 0
    moved = {path for path, value in state.params.items() if not np.array_equal(value, before[path])}
    assert moved == trainable


# Template and layout of stages where they are not those of the family's captions (specs: SOLO 1.3, EVE 2.6,
# EVEv2 3.5).
CHATS = {
    ("solo_7b", "sft"): ("solo_sft", "solo_sft"),
    ("eve_7b", "sft"): ("vicuna", "eve"),
    ("evev2_7b", "full"): ("evev2", "evev2"),
    ("evev2_7b", "sft"): ("evev2", "evev2"),
}


@pytest.mark.parametrize("name", ["solo_7b", "eve_7b", "evev2_7b"])
def test_stages_write_documents_as_published(name):
    config = load(name)
    captions = {"solo_7b": "solo", "eve_7b": "eve_plain", "evev2_7b": "evev2_plain"}[name]
    for stage in config.stages:
        own = config.stage[stage]
        found = own.template or config.data.template, own.layout or config.data.layout
        assert found == CHATS.get((name, stage), (captions, config.data.layout))


def test_the_others_are_the_same_when_small():
    for name in SAME_WHEN_SMALL:
        assert load(f"{name}:tiny").model == load("neo_2b:tiny").model


# Kinds of positions that an image has beside its patches.
MARKS = {"solo_7b": schema.SEPARATOR, "fuyu_8b": schema.SEPARATOR}
MARKS |= {"eve_7b": schema.SLOT, "evev2_7b": schema.SLOT, "breen_7b": schema.SLOT}


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in SAME_WHEN_SMALL])
def test_smoke_reads_the_quickstart_as_the_family_does(name, quickstart_data):
    """A batch of its loader: the family's marks, its own tokens at patches, ids inside the vocabulary."""
    config = config_lib.load(f"{CONFIGS}/{name}.py:smoke", [("data.path", quickstart_data.data.path)])
    with train_loader(config, config.stage[config.stages[0]], seed=0) as loader:
        batch = next(loader)
    kinds = set(np.unique(batch["kinds"])) - {schema.PAD}
    marks = {MARKS[name]} if name in MARKS else set()
    assert kinds == {schema.TEXT, schema.PATCH} | marks
    assert batch["tokens"].max() < config.model.vocab_size
    patches, images = (batch["kinds"] == schema.PATCH).sum(), batch["image_ids"].max(axis=1).sum()
    assert patches == 9 * images and images > 4
    if "<vpatch>" in config.data.special_tokens:
        shown = np.unique(batch["tokens"][batch["kinds"] == schema.PATCH])
        assert shown.tolist() == [base.model().vocab_size + config.data.special_tokens.index("<vpatch>")]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_smoke_runs_train(name, quickstart_data, tmp_path):
    """`:smoke` by its command, all stages, on the quickstart's data: the loss falls."""
    command = [sys.executable, "-m", "neo_jax.train", f"--config={CONFIGS}/{name}.py:smoke"]
    command += [f"--workdir={tmp_path / 'run'}", f"--config.data.path={quickstart_data.data.path}"]
    subprocess.run(command, check=True, cwd=CONFIGS.parent, stdin=subprocess.DEVNULL)
    lines = [line for line in metrics.read(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert lines[-1]["step"] == sum(load(f"{name}:smoke").stage[stage].steps for stage in load(name).stages)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert all(line.get("misrouted_tokens", 0) == 0 for line in lines)
