"""Packing: two budgets, nothing lost, nothing crosses a document's border."""

import numpy as np
import pytest
from hypothesis import given, strategies as st

from data_pipelines import pack, schema
from data_pipelines.errors import DataError
from data_pipelines.schema import Document

PATCH_DIM = 3


def make_document(number: int, num_text: int, pictures: list[int]) -> Document:
    """A document whose tokens, patches and weights tell its number; `pictures` are token counts."""
    kinds, image_ids = [], []
    for image, n in enumerate(pictures, start=1):
        kinds += [schema.TEXT, *[schema.PATCH] * n]
        image_ids += [0, *[image] * n]
    kinds += [schema.TEXT] * num_text
    image_ids += [0] * num_text
    n, p = len(kinds), sum(pictures)
    tokens = 1000 * (number + 1) + np.arange(n)
    return Document(
        name=f"document {number}",
        tokens=tokens.astype(np.int32),
        kinds=np.array(kinds, np.int32),
        image_ids=np.array(image_ids, np.int32),
        coords=np.stack([np.arange(n)] * 3, axis=-1).astype(np.float32),
        targets=np.append(tokens[1:], 0).astype(np.int32),
        loss_weights=np.append(np.ones(n - 1), 0).astype(np.float32),
        patch_hw=np.full((p, 2), number, np.int32),
        load_patches=lambda out=None: np.repeat(
            np.arange(p, dtype=np.uint8)[:, None] + number, PATCH_DIM, axis=1
        ),
        source_id=number % 4,
    )


sizes = st.lists(
    st.tuples(st.integers(1, 12), st.lists(st.integers(1, 6), max_size=2)), min_size=1, max_size=25
)


@given(sizes, st.integers(26, 60), st.integers(12, 30))
def test_every_document_once_and_budgets_kept(sizes, row_tokens, row_patches):
    documents = [make_document(i, *size) for i, size in enumerate(sizes)]
    rows = pack.pack_rows(documents, pack.row_budgets(row_tokens, row_patches))
    assert sorted(d.name for row in rows for d in row) == sorted(d.name for d in documents)
    for row in rows:
        assert sum(len(d.tokens) for d in row) <= row_tokens
        assert sum(len(d.patch_hw) for d in row) <= row_patches


@given(sizes, st.integers(26, 60), st.integers(12, 30))
def test_stacked_rows_hold_the_documents(sizes, row_tokens, row_patches):
    documents = [make_document(i, *size) for i, size in enumerate(sizes)]
    rows = pack.pack_rows(documents, pack.row_budgets(row_tokens, row_patches))
    batch = pack.stack(rows, len(rows) + 1, row_tokens, row_patches, PATCH_DIM)
    for name, (shape, dtype) in schema.batch_shapes(
        len(rows) + 1, row_tokens, row_patches, PATCH_DIM
    ).items():
        assert batch[name].shape == shape and batch[name].dtype == dtype, name

    for b, row in enumerate(rows):
        arrays = {name: array[b] for name, array in batch.items()}
        image = 0
        for segment, document in enumerate(row, start=1):
            own = arrays["segment_ids"] == segment
            for name in ("tokens", "kinds", "coords", "targets", "loss_weights"):
                np.testing.assert_array_equal(arrays[name][own], getattr(document, name), err_msg=name)
            assert (arrays["source_ids"][own] == document.source_id).all()
            shown = arrays["patch_index"][own]
            is_patch = document.kinds == schema.PATCH
            assert (shown[~is_patch] == -1).all()
            np.testing.assert_array_equal(arrays["patch_hw"][shown[is_patch]], document.patch_hw)
            if is_patch.any():
                np.testing.assert_array_equal(arrays["patches"][shown[is_patch]], document.load_patches())
            expected = np.where(is_patch, document.image_ids + image, 0)
            np.testing.assert_array_equal(arrays["image_ids"][own], expected)
            image += document.image_ids.max(initial=0)
        # No token predicts the first token of another document.
        last = np.flatnonzero(np.diff(arrays["segment_ids"], append=0))
        assert not arrays["loss_weights"][last].any()
        assert not arrays["targets"][last].any()

    padding = batch["segment_ids"] == 0
    assert padding[-1].all(), "the added row is empty"
    for name in ("tokens", "kinds", "image_ids", "coords", "targets", "loss_weights", "source_ids"):
        assert not batch[name][padding].any(), name
    assert (batch["patch_index"][padding] == -1).all()
    assert not batch["patches"][-1].any()


def test_fullest_row_with_room_is_chosen():
    documents = [make_document(i, n, []) for i, n in enumerate([6, 7, 3, 4])]
    rows = pack.pack_rows(documents, pack.row_budgets(10, 1))
    assert [[len(d.tokens) for d in row] for row in rows] == [[7, 3], [6, 4]]


def test_the_patch_budget_alone_can_fill_a_row():
    documents = [make_document(i, 1, [3]) for i in range(3)]
    assert len(pack.pack_rows(documents, pack.row_budgets(100, 6))) == 2


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (make_document(5, 11, []), "document 5: 11 tokens exceed row_tokens=10"),
        (make_document(6, 1, [8]), "document 6: 8 image tokens exceed row_patches=7"),
    ],
)
def test_too_large_document_is_an_error(document, message):
    with pytest.raises(DataError, match=message):
        pack.pack_rows([make_document(0, 1, []), document], pack.row_budgets(10, 7))
