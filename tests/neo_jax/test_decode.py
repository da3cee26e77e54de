"""Decoding with a cache equals the full forward pass: logits, greedy choices and likelihoods."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines import pack, schema
from data_pipelines.positions import POSITIONS
from neo_jax import decode, params as params_lib
from neo_jax.model.transformer import Transformer
from tests.neo_jax import rows

# Prompts of different lengths: no image, one, two of different shapes, and one of text behind its image only.
PROMPTS = [((), (7,)), (((2, 3),), (3, 4)), (((1, 2), (3, 2)), (2, 3, 5)), (((2, 2),), (0, 1))]
KINDS = [
    {},
    {"mask": "causal", "coords.kind": "1d"},
    {"pre_buffer": 0, "tie_embeddings": True},
    {"coords.kind": "mrope", "coords.sections": (1, 2, 1), "mask": "prefix"},
]


def prompts():
    rng = np.random.default_rng(0)
    documents = [rows.document(rng, *kind) for kind in PROMPTS]
    return [
        dataclasses.replace(document, loss_weights=np.zeros_like(document.loss_weights))
        for document in documents
    ]


def coords_of(model, document):
    """Where the data layer puts the document's tokens, for a model of this kind."""
    hw = np.zeros((len(document.tokens), 2), np.int32)
    hw[document.kinds == schema.PATCH] = document.patch_hw
    return model.positions(document.image_ids, hw)


def batch_of(model, documents, num_tokens=24):
    """One document per row, in one shape for all tests: rows of padding follow."""
    placed = [dataclasses.replace(document, coords=coords_of(model, document)) for document in documents]
    return pack.stack([[document] for document in placed], len(PROMPTS), num_tokens, 8, rows.PATCH_DIM)


def continued(document, tokens):
    """The document with supervised text behind it."""
    n = len(tokens)
    weights = np.append(document.loss_weights, np.ones(n))
    weights[-n - 1 :] = [1] * n + [0]  # the prompt's last token predicts the first one of the text

    def append(name, values):
        old = getattr(document, name)
        return np.concatenate([old, np.asarray(values, old.dtype)])

    return dataclasses.replace(
        document,
        tokens=append("tokens", tokens),
        kinds=append("kinds", [schema.TEXT] * n),
        image_ids=append("image_ids", [0] * n),
        coords=append("coords", np.zeros((n, 3))),  # batch_of fills them in
        targets=append("targets", [0] * n),
        loss_weights=weights.astype(np.float32),
    )


@pytest.fixture(
    scope="module", params=KINDS, ids=lambda changes: "-".join(map(str, changes.values())) or "neo"
)
def model(request):
    """A bound random model of each kind."""
    config = rows.tiny_model(**request.param)
    unbound = Transformer(config)
    params = params_lib.init(params_lib.abstract(unbound), jax.random.key(1))
    model = params_lib.bind(unbound, params)
    model.positions = functools.partial(POSITIONS[config.coords.kind], delta=config.coords.delta)
    return model


@pytest.fixture(scope="module")
def prefix(model):
    """The prompts, read."""
    return jax.jit(functools.partial(decode.read_prompts, model))(batch_of(model, prompts()))


@functools.lru_cache
def full_forward(model):
    return jax.jit(lambda batch: model.logits(model(batch)))


def full_logits(model, documents):
    """float32 [tokens, V] of each document, by one forward pass over all."""
    logits = np.asarray(full_forward(model)(batch_of(model, documents, num_tokens=32)))
    return [row[: len(document.tokens)] for row, document in zip(logits, documents, strict=False)]


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5)


def test_prompt_logits(model, prefix):
    documents = prompts()
    for b, logits in enumerate(full_logits(model, documents)):
        close(prefix.logits[b], logits[-1])
        assert prefix.lengths[b] == len(documents[b].tokens)


@pytest.mark.parametrize("chunks", [(5,), (1, 1, 3)], ids=str)
def test_extending_the_cache_equals_the_full_forward(model, chunks):
    documents, tail = prompts(), np.random.default_rng(2).integers(6, 64, (len(PROMPTS), sum(chunks)))
    batch = batch_of(model, documents)
    size = batch["tokens"].shape[1] + sum(chunks)
    _, caches = jax.jit(lambda batch: model.prefill(batch, size))(batch)
    lengths = np.array([len(document.tokens) for document in documents], np.int32)
    longer = [continued(d, text) for d, text in zip(documents, tail, strict=True)]
    extend = jax.jit(model.extend)
    found, done = [], 0
    for size in chunks:
        steps = done + np.arange(size)
        coords = np.stack([coords_of(model, d)[-sum(chunks) :][steps] for d in longer])
        tokens, slots = tail[:, steps].astype(np.int32), (lengths[:, None] + steps).astype(np.int32)
        hidden, caches = extend(tokens, jnp.asarray(coords), jnp.asarray(slots), caches)
        found.append(model.logits(hidden))
        done += size
    found = np.concatenate(found, axis=1)
    expected = full_logits(model, longer)
    for b, logits in enumerate(expected):
        close(found[b], logits[lengths[b] :])


def greedy_by_full_forwards(model, document, steps):
    tokens = []
    for _ in range(steps):
        [logits] = full_logits(model, [continued(document, tokens)])
        tokens.append(int(logits[-1].argmax()))
    return tokens


def test_greedy(model, prefix):
    documents, steps = prompts(), 6
    expected = [greedy_by_full_forwards(model, document, steps) for document in documents]
    greedy = jax.jit(lambda stop: decode.greedy(model, prefix, stop_id=stop, max_new_tokens=steps))
    unused = next(token for token in range(64) if all(token not in row for row in expected))
    found = greedy(np.int32(unused))
    np.testing.assert_array_equal(found, expected)

    # A token of the first row as the stop: every row goes on to its own first occurrence of it.
    stop = expected[0][2]
    found = np.asarray(greedy(np.int32(stop)))
    for row, whole in zip(found, expected, strict=True):
        end = whole.index(stop) if stop in whole else steps
        assert row.tolist() == whole[:end] + [stop] * (steps - end)


def test_scores_equal_full_forwards(model, prefix):
    documents, rng = prompts(), np.random.default_rng(3)
    lengths = np.array([1, 4, 2, 6, 3], np.int32)
    tokens = rng.integers(6, 64, (len(lengths), 6)).astype(np.int32)
    found = jax.jit(lambda *args: decode.score_candidates(model, *args))(prefix, tokens, lengths)
    assert found.shape == (len(documents), len(lengths))
    for c, length in enumerate(lengths):
        text = tokens[c, :length]
        for b, logits in enumerate(full_logits(model, [continued(d, text) for d in documents])):
            log_p = np.asarray(jax.nn.log_softmax(logits[-length - 1 : -1]))
            close(found[b, c], log_p[np.arange(length), text].sum())


def test_scores_of_single_tokens(model, prefix):
    found = decode.score_candidates(model, prefix, jnp.arange(64)[:, None], jnp.ones(64, jnp.int32))
    close(np.exp(found).sum(axis=1), 1.0)
    np.testing.assert_array_equal(found.argmax(axis=1), prefix.logits.argmax(axis=1))
