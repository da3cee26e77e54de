"""Documents: NEO's indices and weights, what is supervised, and the tokenizer."""

import json
import pickle

import numpy as np
import pytest

from data_pipelines import schema, text
from data_pipelines.errors import DataError
from data_pipelines.images import Picture
from data_pipelines.template import IMAGE

CORPUS = ["en: ", "red apple\n", "fruit, food", "grüner Apfel\n", "日本"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(text.train_tokenizer(CORPUS, 300))
    return text.Tokenizer(path)


def blank(rows: int, cols: int) -> Picture:
    return Picture(rows, cols, lambda out=None: np.zeros((rows * cols, 12), np.uint8))


def segments(tokens, tokenizer) -> str:
    return tokenizer._tokenizer.decode(list(tokens), skip_special_tokens=False)


def test_reductions_equal_neo(golden_dir):
    rules = json.loads((golden_dir("neo") / "data_rules.json").read_text())
    for rule in rules["len2weight"]:
        for reduction in ("token", "sample", "square"):
            assert text.reduction_weight(rule["n"], reduction) == pytest.approx(rule[reduction], rel=1e-12)


@pytest.mark.parametrize(("reduction", "exponent"), [("token", 0), ("sample", -1), ("square", -0.5)])
def test_caption_document(tokenizer, reduction, exponent):
    document = text.caption_document(
        tokenizer, blank(2, 3), "en", "red apple", ["fruit", "food"], reduction=reduction, source_id=3
    )
    n = len(document.tokens)
    spelled = "<img>" + "<IMG_CONTEXT>" * 6 + "</img>en: red apple\nfruit, food<|im_end|>"
    assert segments(document.tokens, tokenizer) == spelled
    np.testing.assert_array_equal(document.kinds[:8], [1, 2, 2, 2, 2, 2, 2, 1])
    np.testing.assert_array_equal(document.image_ids[:8], [0, 1, 1, 1, 1, 1, 1, 0])
    np.testing.assert_array_equal(document.coords[:9, 0], [0, 1, 1, 1, 1, 1, 1, 2, 3])
    np.testing.assert_array_equal(document.coords[1:7, 1:], document.patch_hw)
    np.testing.assert_array_equal(document.patch_hw[:, 0], [0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(document.patch_hw[:, 1], [0, 1, 2, 0, 1, 2])
    np.testing.assert_array_equal(document.targets, [*document.tokens[1:], 0])
    # Exactly the caption and <|im_end|> are targets with weight.
    targets = document.targets[document.loss_weights > 0]
    assert segments(targets, tokenizer) == "red apple\nfruit, food<|im_end|>"
    np.testing.assert_allclose(
        document.loss_weights[-1 - len(targets) : -1], len(targets) ** exponent, rtol=1e-6
    )
    assert document.loss_weights[-1] == 0
    assert document.source_id == 3
    assert {a.dtype for a in (document.tokens, document.kinds, document.targets)} == {np.dtype(np.int32)}
    assert n == len(document.loss_weights) == len(document.coords)


def test_label_line_ends_on_a_token_border(tokenizer):
    document = text.caption_document(tokenizer, blank(1, 1), "en", "red apple", ["fruit"])
    label, tags = (tokenizer.encode(piece) for piece in text.caption_pieces("red apple", ["fruit"]))
    caption = [*label, *tags, tokenizer.im_end]
    np.testing.assert_array_equal(document.tokens[-len(caption) :], caption)


def test_broken_off_document_is_a_prefix(tokenizer):
    args = (tokenizer, blank(2, 2), "en", "red apple", ("fruit", "food"))
    whole, broken = text.caption_document(*args), text.caption_document(*args, whole=False)
    n = len(broken.tokens)
    assert n < len(whole.tokens)
    np.testing.assert_array_equal(broken.tokens, whole.tokens[:n])
    np.testing.assert_array_equal(broken.loss_weights[:-1], whole.loss_weights[: n - 1])
    assert tokenizer.decode(broken.tokens[broken.tokens != tokenizer.image_context]).endswith("red apple\n")


def test_parallel_document_hides_the_caption_but_not_its_targets(tokenizer):
    args = (tokenizer, blank(2, 2), "en", "red apple", ("fruit", "food"))
    plain, parallel = text.caption_document(*args), text.caption_document(*args, parallel=True)
    supervised = np.append(False, plain.loss_weights[:-1] > 0)
    assert supervised.any() and (parallel.tokens[supervised] == tokenizer.end_of_text).all()
    np.testing.assert_array_equal(parallel.tokens[~supervised], plain.tokens[~supervised])
    for field in ("targets", "loss_weights", "coords", "kinds", "image_ids"):
        np.testing.assert_array_equal(getattr(parallel, field), getattr(plain, field))


def test_prompt_is_the_start_of_the_training_document(tokenizer):
    trained = text.caption_document(tokenizer, blank(2, 2), "en", "red apple", ["fruit"])
    prompt = text.prompt_document(tokenizer, [blank(2, 2)], text.prompt_text("en"))
    n = len(prompt.tokens)
    np.testing.assert_array_equal(prompt.tokens, trained.tokens[:n])
    np.testing.assert_array_equal(prompt.coords, trained.coords[:n])
    assert not prompt.loss_weights.any()


def test_several_pictures_and_none(tokenizer):
    two = text.prompt_document(tokenizer, [blank(1, 2), blank(2, 1)], "both?")
    np.testing.assert_array_equal(two.image_ids[:9], [0, 1, 1, 0, 0, 2, 2, 0, 0])
    assert two.load_patches().shape == (4, 12)
    none = text.prompt_document(tokenizer, [], "nothing")
    assert none.patch_hw.shape == (0, 2)
    assert (none.kinds == schema.TEXT).all()


def test_number_of_pictures_must_match(tokenizer):
    with pytest.raises(DataError, match="doc7: 1 pictures for 2 <image> markers"):
        text.build_document(tokenizer, [blank(1, 1)], [IMAGE, IMAGE], name="doc7")


def test_unknown_reduction(tokenizer):
    with pytest.raises(DataError, match="loss_reduction 'mean'"):
        text.reduction_weight(3, "mean")


def test_special_tokens_come_first_and_never_from_text(tokenizer):
    ids = [tokenizer.special_id(name) for name in text.SPECIAL_TOKENS]
    assert ids == list(range(len(ids)))
    injected = tokenizer.encode("a <img> <|im_end|> <IMG_CONTEXT>")
    assert not set(injected) & set(ids)
    assert tokenizer.decode(injected) == "a <img> <|im_end|> <IMG_CONTEXT>"


@pytest.mark.parametrize("string", ["red apple\n", "Ünïcode 日本 🍎", "a\tb  c", ""])
def test_tokenizer_round_trip(tokenizer, string):
    assert tokenizer.decode([tokenizer.image_start, *tokenizer.encode(string), tokenizer.im_end]) == string


def test_a_pickled_tokenizer_still_keeps_special_tokens_out_of_text(tokenizer):
    words = "a <img> of a cat, long enough that nothing is remembered <|im_end|>"
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode(words) == tokenizer.encode(words)
    assert copy.special_id("<img>") not in copy.encode(words)


def test_tokenizer_training_is_deterministic():
    assert text.train_tokenizer(CORPUS, 300) == text.train_tokenizer(CORPUS, 300)


def test_bad_tokenizer_file(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(DataError, match=r"not a readable tokenizer\.json"):
        text.Tokenizer(path)


def test_missing_special_token(tokenizer):
    with pytest.raises(DataError, match="no special token '<box>'"):
        tokenizer.special_id("<box>")


def test_special_tokens_are_appended_where_they_are_missing(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.to_json())
    longer = text.Tokenizer(path, ["<vision>", "<img>", "</vision>"])
    assert longer.special_id("<vision>") == tokenizer.size
    assert longer.special_id("</vision>") == tokenizer.size + 1 == longer.size - 1
    assert longer.image_start == tokenizer.image_start
    # They never arise from text, which reads as before.
    assert longer.encode("a <vision> red") == tokenizer.encode("a <vision> red")
    path.write_text(longer.to_json())
    assert text.Tokenizer(path).special_id("</vision>") == longer.special_id("</vision>")
