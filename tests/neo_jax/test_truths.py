"""What must hold whatever is configured: of every family, on documents as it lays them out.

A primitive at its identity init leaves text as it was; packing, caching and scanning change nothing.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from data_pipelines import schema
from neo_jax import decode, params as params_lib
from neo_jax.model.coords import rotary
from neo_jax.model.route import routing
from neo_jax.model.transformer import Transformer
from tests.neo_jax import families

# Experiments whose small forms differ, and positions that no published config uses. Everything runs without a
# cut between text and visual tokens (route.py): that the cut changes nothing is shown in test_route.py.
CASES = {
    **{name: (name, {}) for name in families.FAMILIES if name not in ("neo_9b", "neo_ov_2b")},
    "mrope": ("neo_2b", {"coords.kind": "mrope", "coords.sections": (4, 2, 2)}),
    "v2pe": ("neo_2b", {"coords.kind": "v2pe", "coords.delta": 0.3}),
    "thw_split": ("neo_2b", {"coords.kind": "thw_split"}),
}
TAIL = 4  # words behind the last image of a document


def tiny(name, **changes):
    """The tiny form of an experiment, changed."""
    config = ConfigDict(families.load(f"{name}:tiny").to_dict())
    config.model.route.visual_share = 0.0
    config.model.update_from_flattened_dict(changes)
    return config


def random_params(model, seed=0):
    specs = params_lib.abstract(model)
    return jax.jit(lambda key: params_lib.init(specs, key))(jax.random.key(seed))


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    config: ConfigDict
    model: Transformer  # bound
    documents: list
    logits: np.ndarray  # of rows [both documents], [the first], [the second]


@functools.cache
def case(name):
    family, changes = CASES[name]
    config, rng = tiny(family, **changes), np.random.default_rng(0)
    documents = [
        families.document(config, rng, ((2, 3),), (3, TAIL)),
        families.document(config, rng, ((1, 2), (3, 2)), (2, 1, TAIL)),
    ]
    unbound = Transformer(config.model)
    model = params_lib.bind(unbound, random_params(unbound))
    batch = stack(config, [documents, documents[:1], documents[1:]])
    logits = jax.jit(lambda batch: model.logits(model(batch)))(batch)
    return Case(config, model, documents, np.asarray(logits))


def stack(config, rows, spare=3):
    length = max(sum(len(document.tokens) for document in row) for row in rows)
    patches = max(sum(len(document.patch_hw) for document in row) for row in rows)
    return families.stack(config, rows, row_tokens=length + spare, row_patches=patches + 1)


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize("name", CASES)
def test_packed_equals_unpacked(name):
    first, second = (len(document.tokens) for document in case(name).documents)
    both, alone, other = case(name).logits
    close(both[:first], alone[:first])
    close(both[first : first + second], other[:second])


def without_tail(document):
    """The document up to its last image: what follows starts right behind it."""
    cut = len(document.tokens) - TAIL
    fields = ("tokens", "kinds", "image_ids", "coords", "targets", "loss_weights")
    return dataclasses.replace(document, **{field: getattr(document, field)[:cut] for field in fields})


@pytest.mark.parametrize("name", CASES)
def test_reading_a_prompt_and_going_on_equals_the_full_forward(name):
    """Visual weights serve the prompt alone; positions behind an image are those of the data."""
    config, model, documents = case(name).config, case(name).model, case(name).documents
    prompts = [without_tail(document) for document in documents]
    batch = stack(config, [[prompt] for prompt in prompts])
    tails = np.stack([document.tokens[-TAIL:] for document in documents])

    @jax.jit
    def scores(batch, tails):
        prefix = decode.read_prompts(model, batch)
        return prefix, decode.score_candidates(model, prefix, tails, jnp.full(len(tails), TAIL))

    prefix, found = scores(batch, tails)
    for b, document in enumerate(documents):
        assert float(prefix.t[b]) == document.coords[-TAIL, 0]
        length = len(document.tokens)
        logits = case(name).logits[1 + b][length - TAIL - 1 : length - 1]
        close(prefix.logits[b], logits[0])
        log_p = jax.nn.log_softmax(logits)[np.arange(TAIL), tails[b]]
        close(found[b, b], log_p.sum())


@pytest.mark.parametrize("name", ["neo_2b", "evev2_7b", "fuyu_8b"])
def test_scanned_equals_unrolled(name):
    """One layer after the other, by their own weights."""
    config, model, documents = case(name).config, case(name).model, case(name).documents
    batch = stack(config, [documents, documents[:1], documents[1:]])

    @jax.jit
    def unrolled(batch):
        x, table = model.embed(batch), rotary(model.rotary_parts, batch["coords"])
        route = routing(batch["kinds"], 0.0) if model.routes else None
        for stack_name, depth in zip(model.stacks, model.depths, strict=True):
            graph, params = nnx.split(getattr(model, stack_name))
            for layer in range(depth):
                block = nnx.merge(graph, jax.tree.map(lambda p, layer=layer: p[layer], params))
                x, *_ = block(x, table, model.intervals(batch), route)
        return model.logits(model.norm(x))

    close(unrolled(batch), case(name).logits)


def logits_of(config, params, documents):
    model = params_lib.bind(Transformer(config.model), params)
    batch = stack(config, [[document] for document in documents])
    logits = np.asarray(jax.jit(lambda batch: model.logits(model(batch)))(batch))
    return [row[: len(document.tokens)] for row, document in zip(logits, documents, strict=True)]


def test_neo_with_zero_hw_keys_and_a_silent_pre_buffer_is_its_text_base():
    """Its start (specs: neo.md 7): K_hw = 0; a pre-buffer adds nothing if its output matrices are 0."""
    config = tiny("neo_2b")
    base = tiny("neo_2b", pre_buffer=0, num_layers=2, mask="causal", **{"coords.kind": "1d"})
    neo = random_params(Transformer(config.model))
    for path in neo:
        if path == "layers/attention/qkv/k_hw/weight" or (
            path.startswith("pre_buffer/") and path.endswith(("/o/weight", "/down/weight"))
        ):
            neo[path] = jnp.zeros_like(neo[path])
    shared = {path: neo[path] for path in params_lib.abstract(Transformer(base.model))}
    text = [families.document(config, np.random.default_rng(1), (), (12,))]
    [expected], [found] = logits_of(base, shared, text), logits_of(config, neo, text)
    close(found, expected)
    # And the H/W keys matter as soon as they are not 0, in an image: the test can fail.
    image = [families.document(config, np.random.default_rng(1))]
    moved = neo | {"layers/attention/qkv/k_hw/weight": 0.1 + neo["layers/attention/qkv/k_hw/weight"]}
    [before], [after] = logits_of(config, neo, image), logits_of(config, moved, image)
    assert np.abs(before - after).max() > 1e-3


def test_hovle_with_a_silent_embedding_is_its_language_model():
    config = tiny("hovle_2b")
    base = tiny("hovle_2b", pre_buffer=0, num_layers=2)
    hovle = random_params(Transformer(config.model))
    hovle |= {
        path: jnp.zeros_like(value)
        for path, value in hovle.items()
        if path.startswith("pre_buffer/") and path.endswith(("/o/weight", "/down/weight"))
    }
    shared = {path: hovle[path] for path in params_lib.abstract(Transformer(base.model))}
    rng = np.random.default_rng(1)
    documents = [families.document(config, rng), families.document(config, rng, (), (12,))]
    pairs = zip(logits_of(config, hovle, documents), logits_of(base, shared, documents), strict=True)
    for found, expected in pairs:
        close(found, expected)


@pytest.mark.parametrize("name", ["evev2_7b", "mono_internvl_2b", "breen_7b"])
def test_copied_experts_are_the_dense_model(name):
    """Every visual weight a copy of its text original, as EVEv2 and Mono-InternVL start."""
    config = tiny(name)
    dense = tiny(name, **{f"route.{module}": "shared" for module in ("attention", "mlp", "norm")})
    routed = random_params(Transformer(config.model))
    routed |= {path: routed[path.replace("/visual/", "/text/")] for path in routed if "/visual/" in path}
    shared = {path.replace("/text/", "/"): value for path, value in routed.items() if "/visual/" not in path}
    document = families.document(config, np.random.default_rng(1), ((2, 3),), (3, 4))
    assert (document.kinds == schema.PATCH).any()
    [expected], [found] = logits_of(dense, shared, [document]), logits_of(config, routed, [document])
    close(found, expected)


@pytest.mark.parametrize("name", ["evev2_7b", "mono_internvl_2b", "breen_7b"])
def test_text_never_meets_the_experts(name):
    """Logits of text alone do not depend on visual weights."""
    config = tiny(name)
    params = random_params(Transformer(config.model))
    others = random_params(Transformer(config.model), seed=1)
    changed = params | {path: others[path] for path in params if "/visual/" in path}
    text = [families.document(config, np.random.default_rng(1), (), (12,))]
    np.testing.assert_array_equal(*logits_of(config, params, text), *logits_of(config, changed, text))


def test_v2pe_with_steps_of_one_is_one_dimensional():
    v2pe = tiny("mono_internvl_2b", **{"coords.kind": "v2pe", "coords.delta": 1.0})
    one_d = tiny("mono_internvl_2b")
    params = random_params(Transformer(one_d.model))
    documents = [families.document(c, np.random.default_rng(1)) for c in (v2pe, one_d)]
    [found], [expected] = logits_of(v2pe, params, documents[:1]), logits_of(one_d, params, documents[1:])
    close(found, expected)
