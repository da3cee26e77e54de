"""Documents of every kind from examples: captions, pages, conversations, several images, video, text."""

import dataclasses

import numpy as np
import pytest

from configs import base
from data_pipelines import schema, text
from data_pipelines.documents import DocumentRules
from data_pipelines.errors import Reject
from data_pipelines.images import Limits
from data_pipelines.layout import LAYOUTS
from data_pipelines.positions import POSITIONS
from data_pipelines.resize import RESIZES, Resize
from data_pipelines.schema import Example, Image, Text
from data_pipelines.template import BOS, EOS, TEMPLATES
from tests.data_pipelines.recorded import ASCII, character_tokenizer, png

SIDE = 4
RNG = np.random.default_rng(0)
WIDE, TALL, SMALL = (png(RNG.integers(0, 256, (h, w, 3), np.uint8)) for h, w in ((16, 40), (24, 9), (8, 8)))
SPECIAL = [BOS, EOS, "<|im_start|>", "<|im_end|>", "<|endoftext|>", "|ENDOFTEXT|", "|SPEAKER|", "|NEWLINE|"]
SPECIAL += ["<img>", "</img>", "<IMG_CONTEXT>", "<vision>", "</vision>", "<vpatch>", "<vrow_sep>", "<unk>"]
SPECIAL += [f"<0x0{i}>" for i in range(5)]
EXAMPLES = {
    "caption": (Image(WIDE), Text("a cat", supervised=True)),
    "page": (Text("First ", supervised=True), Image(TALL), Text(" then ", supervised=True), Image(SMALL)),
    "chat": (Text("What? ", "user"), Image(WIDE), Text("A cat.", "assistant", True)),
    "video": (
        *(Image(SMALL, t / 2) for t in range(3)),
        Text("Where?", "user"),
        Text("Here", "assistant", True),
    ),
    "text": (Text("only words", supervised=True),),
}


@pytest.fixture
def rules(tmp_path):
    names = [*SPECIAL, *ASCII, "\n"]
    tokenizer = character_tokenizer(tmp_path / "tokenizer.json", {name: i for i, name in enumerate(names)})
    return DocumentRules(tokenizer, Resize("neo", SIDE, SIDE**2, 32**2))


def example(kind: str) -> Example:
    return Example(kind, "test", EXAMPLES[kind])


@pytest.mark.parametrize("kind", EXAMPLES)
@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_with_every_kind_of_document(rules, name, kind):
    layouts = {
        "solo": "solo",
        "solo_sft": "solo_sft",
        "eve_plain": "eve",
        "evev2_plain": "evev2",
        "fuyu": "fuyu",
    }
    rules = dataclasses.replace(rules, template=name, layout=layouts.get(name, "neo"), coords="1d")
    document = rules.document(example(kind), source_id=3)
    n, p = len(document.tokens), len(document.patch_hw)
    num_images = len(example(kind).images)
    assert document.source_id == 3 and document.name == kind
    assert set(document.image_ids) == set(range(num_images + 1))
    assert (document.kinds == schema.PATCH).sum() == p
    assert p == (len(document.load_patches()) if num_images else 0)
    np.testing.assert_array_equal(document.targets[:-1], document.tokens[1:])
    for field in ("kinds", "image_ids", "targets", "loss_weights"):
        assert getattr(document, field).shape == (n,)
    # What is learnt is text, never a part of an image, and it is what the example says.
    learnt = np.flatnonzero(document.loss_weights) + 1
    assert learnt.size and (document.kinds[learnt] == schema.TEXT).all()
    words = rules.tokenizer._tokenizer.decode(document.tokens[learnt].tolist(), skip_special_tokens=False)
    for span in example(kind).texts:
        if span.supervised:  # the first token of a document is predicted by nothing
            assert span.text.replace(" ", "")[1:] in words.replace(" ", "")
    # The prompt is the beginning of the conversation.
    question = Example(
        kind, "test", tuple(s for s in EXAMPLES[kind] if isinstance(s, Image) or not s.supervised)
    )
    prompt = rules.prompt(question)
    assert not prompt.loss_weights.any()
    if kind in ("chat", "video") and name not in ("plain", "solo"):
        np.testing.assert_array_equal(prompt.tokens, document.tokens[: len(prompt.tokens)])


def test_a_smaller_budget_makes_a_shorter_document_of_the_same_words(rules):
    for kind in ("caption", "chat", "video"):
        whole, small = rules.document(example(kind)), rules.document(example(kind), max_pixels=8**2)
        assert len(small.patch_hw) < len(whole.patch_hw)
        texts = [d.tokens[d.kinds == schema.TEXT] for d in (whole, small)]
        np.testing.assert_array_equal(*texts)
        assert len(small.load_patches()) == len(small.patch_hw)


def test_several_images_share_the_budget(rules):
    one = rules.document(Example("x", "test", (Image(WIDE), Text("a", supervised=True))))
    four = rules.document(Example("x", "test", (*[Image(WIDE)] * 4, Text("a", supervised=True))))
    assert len(one.patch_hw) * SIDE**2 <= 32**2
    assert len(one.patch_hw) < len(four.patch_hw) and len(four.patch_hw) * SIDE**2 <= 2 * 32**2


def test_tiles_are_images_of_their_own(rules):
    rules = dataclasses.replace(
        rules, resize=Resize("internvl", SIDE, 1, 6 * 8**2, tile=8), layout="internvl"
    )
    document = rules.document(example("caption"))  # 16 x 40: one by three tiles, or two by three
    tiles = document.image_ids.max()
    assert tiles in (4, 3, 7) and (np.bincount(document.image_ids)[1:] == 4).all()
    assert len(document.load_patches()) == 4 * tiles


@pytest.mark.parametrize(
    ("spans", "reason"),
    [
        ((), "empty"),
        ((Text("q", "user"),), "no_target"),
        ((Image(WIDE),), "no_target"),
        ((Image(b"junk"), Text("a", supervised=True)), "not_image"),
        ((Image(SMALL[:20]), Text("a", supervised=True)), "truncated"),
        ((Image(SMALL), Text("a", supervised=True)), "too_small"),
    ],
)
def test_rejects_carry_their_reason_and_the_examples_name(rules, spans, reason):
    rules = dataclasses.replace(rules, limits=Limits(min_side=9))
    with pytest.raises(Reject, match="record7") as rejected:
        rules.document(Example("record7", "test", spans))
    assert rejected.value.reason == reason


def test_augmentation_is_drawn_from_the_generator(rules):
    draws = [rules.document(example("caption"), rng=np.random.default_rng(seed)) for seed in (1, 1, 2)]
    pixels = [draw.load_patches() for draw in draws]
    np.testing.assert_array_equal(pixels[0], pixels[1])
    assert (pixels[0] != pixels[2]).any()
    np.testing.assert_array_equal(draws[0].tokens, draws[2].tokens)


def test_rules_of_a_config(rules):
    config = base.get_config()
    stage = base.stage(1, loss_reduction="sample", min_pixels=64, max_pixels=4096)
    config.data.template, config.data.layout, config.data.resize = "evev2", "evev2", "evev2"
    config.model.coords.kind = "1d"
    made = DocumentRules.from_config(config, stage, rules.tokenizer)
    side = config.model.embed.patch_size * config.model.embed.merge_size
    assert made.resize == Resize("evev2", side, 64, 4096)
    assert (made.template, made.layout, made.coords, made.reduction) == ("evev2", "evev2", "1d", "sample")
    document = made.document(example("chat"))
    assert document.loss_weights.sum() == pytest.approx(1)
    stage.template, stage.layout = "solo_sft", "solo_sft"
    made = DocumentRules.from_config(config, stage, rules.tokenizer)
    assert (made.template, made.layout) == ("solo_sft", "solo_sft")
    assert made.document(example("chat")).tokens[0] == rules.tokenizer.special_id("<vision>")


def test_every_rule_layout_and_position_is_a_choice_of_the_config():
    from neo_jax.validate import CHOICES

    assert CHOICES["data.template"] == tuple(TEMPLATES)
    assert CHOICES["data.layout"] == tuple(LAYOUTS)
    assert CHOICES["stage.*.template"] == ("", *TEMPLATES) and CHOICES["stage.*.layout"] == ("", *LAYOUTS)
    assert CHOICES["data.resize"] == tuple(RESIZES)
    assert set(CHOICES["model.coords.kind"]) == set(POSITIONS)
    assert text.REDUCTION_EXPONENTS.keys() == set(CHOICES["stage.*.loss_reduction"])
