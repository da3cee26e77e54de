"""What each family writes and learns: ids, labels and rows of the recordings, and the rules of turns."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from data_pipelines import pack, schema, template
from data_pipelines.documents import DocumentRules
from data_pipelines.errors import Reject
from data_pipelines.resize import Resize
from data_pipelines.schema import Example, Image, Text
from data_pipelines.template import IMAGE, TEMPLATES, Piece, turns
from tests.data_pipelines.recorded import Recording, collapsed, conversation, png


@pytest.fixture
def recording(golden_dir, tmp_path):
    return lambda family: Recording(golden_dir(family), tmp_path)


def spell(pieces: list[Piece], images: list[str]) -> tuple[str, list[bool], set[int]]:
    """Text with every image spelled out, whether each character is learnt, and where pieces begin."""
    words, learnt, borders, remaining = "", [], set(), iter(images)
    for piece in pieces:
        borders.add(len(words))
        new = next(remaining) if piece == IMAGE else piece.text
        words += new
        learnt += [piece.supervised] * len(new)
    return words, learnt, borders


# InternVL, by hand from its code (conversation.py, dataset.py: "internlm2-chat"); nothing was recorded.


def test_internlm2_conversations():
    spans = (Image(b""), Text("\nWhat? ", "user"), Text(" A cat.\n", "assistant", True), Text("Why?", "user"))
    pieces = TEMPLATES["internlm2"](spans, [1.0], True)
    words, learnt, _ = spell(pieces, ["<img>..</img>"])
    system = f"<s><|im_start|>system\n{template.INTERNVL_SYSTEM}<|im_end|>"
    question = "<|im_start|>user\n<img>..</img>\nWhat?<|im_end|><|im_start|>assistant\n"
    answer, rest = "A cat.<|im_end|>", "<|im_start|>user\nWhy?<|im_end|><|im_start|>assistant\n"
    assert words == system + question + answer + rest
    expected = [(system + question, False), (answer, True), (rest, False)]
    assert learnt == [flag for text, flag in expected for _ in text]
    assert Piece("A cat.", supervised=True, joined=True) in pieces, "in one go with its header"
    own = TEMPLATES["internlm2"]((Text("Be brief.", "system"), *spans), [1.0], False)
    assert spell(own, [""])[0].startswith("<s><|im_start|>system\nBe brief.<|im_end|><|im_start|>user\n")


# NEO


def test_neo_conversations(golden_dir):
    rules = json.loads((golden_dir("neo") / "data_rules.json").read_text())
    assert rules["chat"]
    for case in rules["chat"]:
        images = [f"<img>{'<IMG_CONTEXT>' * n}</img>" for n in case["num_image_tokens"]]
        spans = conversation(case, [b""] * len(images)).spans
        words, learnt, borders = spell(TEMPLATES["chatml"](spans, [1.0] * len(images), False), images)
        expected, flags, starts = "", [], []
        for segment in case["segments"]:
            starts.append(len(expected))
            expected += segment["text"]
            flags += [segment["supervised"]] * len(segment["text"])
        assert words == expected
        assert learnt == flags
        assert borders >= set(starts), "the reference tokenises these apart"


def test_neo_prompts(golden_dir):
    rules = json.loads((golden_dir("neo") / "data_rules.json").read_text())
    assert rules["prompts"]
    for case in rules["prompts"]:
        turns_ = [("system", case["system"])] if case["system"] else []
        for question, answer in case["history"]:
            turns_ += [("human", question), ("gpt", answer)]
        turns_.append(("human", case["question"]))
        row = {"conversations": [{"from": role, "value": words} for role, words in turns_]}
        images = [b""] * case["question"].count("<image>")
        words, *_ = spell(
            TEMPLATES["chatml"](conversation(row, images).spans, [], True), ["<image>"] * len(images)
        )
        assert words == case["prompt"]


# EVE and EVEv2


@pytest.mark.parametrize("family", ["eve", "evev2"])
def test_eve_training_rows(recording, family):
    golden = recording(family)
    rows, dims = json.loads((golden.folder / "dataset.json").read_text()), golden.config["dims"]
    if family == "eve":
        grid = (dims["image_size_clip"], dims["patch_clip"])
        to = Resize("eve", dims["patch"] * dims["conv"], 1, dims["image_size"] ** 2, grid=grid)
        templates = {"plain": "eve_plain", "chat": "vicuna"}
    else:
        to = Resize("evev2", dims["patch"] * dims["dense"], 1, dims["max_size"] ** 2)
        templates = {"plain": "evev2_plain", "chat": "evev2"}
    tokenizer = golden.described_tokenizer()
    for kind, name in templates.items():
        rules = DocumentRules(tokenizer, to, template=name, layout=family, coords="1d")
        assert rows[f"{kind}_rows"]
        for number, row in enumerate(rows[f"{kind}_rows"]):
            images = [png(golden.pictures[int(row["image"].split(".")[0])])] if "image" in row else []
            document = rules.document(conversation(row, images))
            recorded = {
                key: golden.preprocess[f"train.{kind}.{number}.{key}"] for key in ("input_ids", "labels")
            }
            ids, labels = collapsed(document, golden.config["image_token_index"])
            np.testing.assert_array_equal(ids, recorded["input_ids"])
            # Nothing predicts a row's first token, whatever its label.
            np.testing.assert_array_equal(labels[1:], recorded["labels"][1:])
            np.testing.assert_array_equal(document.coords[:, 0], np.arange(len(document.tokens)))
            assert bool(len(document.patch_hw)) == bool(images)


# SOLO


@pytest.fixture
def solo(recording):
    """(packing.json, packing.safetensors, our documents)."""
    golden = recording("solo")
    packing = json.loads((golden.folder / "packing.json").read_text())
    arrays = load_file(golden.folder / "packing.safetensors")
    rules = DocumentRules(
        golden.solo_tokenizer(packing),
        Resize("solo", golden.config["config"]["vision_patch_size"], 1, 1024**2),
        template="solo",
        layout="solo",
        coords="1d",
    )
    documents = []
    for number, parts in enumerate(packing["docs"]):
        spans = []
        for part in parts:
            kind, _, rest = part.partition(" ")
            pixels = arrays[f"img{rest}.uint8_hwc"] if kind == "image" else None
            spans.append(Text(part.removeprefix("text: ")) if pixels is None else Image(png(pixels)))
        documents.append(rules.document(Example(f"doc{number}", "golden", tuple(spans))))
    return packing, arrays, documents


def test_solo_documents(solo):
    packing, arrays, documents = solo
    for number, document in enumerate(documents):
        tokens, kinds = document.tokens[1:], document.kinds[1:]  # the first is the separator
        assert (document.tokens[0], document.num_separators) == (packing["bos"], 1)
        np.testing.assert_array_equal(tokens, arrays[f"doc{number}.tokens"])
        is_patch = kinds == schema.PATCH
        index = np.where(is_patch, np.cumsum(is_patch) - 1, -1)
        np.testing.assert_array_equal(index, arrays[f"doc{number}.vision_patch_indices"])
        np.testing.assert_array_equal(is_patch, arrays[f"doc{number}.roles"] == packing["roles"]["image"])
        # Learnt is text whose id is below the first of vision.
        learnt = ~is_patch & (tokens < packing["no_loss_beyond_token_id"])
        np.testing.assert_array_equal(document.loss_weights[:-1], learnt.astype(np.float32))


def test_solo_rows(solo):
    packing, arrays, documents = solo
    length, remaining, number = packing["seq_length"], list(documents), 0
    while f"batch{number}.text" in arrays:
        row, size = [], -1  # the document that opens a row has no separator
        while remaining and size + len(remaining[0].tokens) <= packing["max_seq_length"]:
            size += len(remaining[0].tokens)
            row.append(remaining.pop(0))
        batch = pack.stack([row], 1, length, 64, documents[0].load_patches().shape[1])
        golden = {name: arrays[f"batch{number}.{name}"] for name in ("text", "loss_mask", "position_ids")}
        used = batch["segment_ids"][0] > 0
        np.testing.assert_array_equal(batch["tokens"][0][used], arrays[f"pack{number}.tokens"])
        np.testing.assert_array_equal(batch["tokens"], golden["text"][:, :length])
        np.testing.assert_array_equal(batch["loss_weights"], golden["loss_mask"])
        learnt = batch["loss_weights"] > 0
        np.testing.assert_array_equal(batch["targets"][learnt], golden["text"][:, 1:][learnt])
        np.testing.assert_array_equal(batch["patch_index"], arrays[f"batch{number}.vision_patch_indices"])
        assert batch["patch_index"].max() + 1 == arrays[f"batch{number}.n_patches"][0]
        np.testing.assert_array_equal(batch["coords"][0, used, 0], golden["position_ids"][0, used])
        lengths = np.bincount(batch["segment_ids"][0])[1:]
        recorded = arrays[f"batch{number}.attention_mask_in_length"][0]
        np.testing.assert_array_equal(lengths, recorded[recorded > 0])
        segments, place = batch["segment_ids"][0][used], np.arange(used.sum())
        allowed = (segments[:, None] == segments[None]) & (place[:, None] >= place[None])
        masked_out = arrays[f"batch{number}.attention_mask"][0][used][:, used]
        np.testing.assert_array_equal(allowed, masked_out == 0)
        number += 1
    assert number and not remaining


# Fuyu


def test_fuyu_prompts(recording):
    golden = recording("fuyu")
    dims = golden.config["dims"]
    canvas = tuple(dims["size"])
    rules = DocumentRules(
        golden.fuyu_tokenizer(),
        Resize("fuyu", dims["patch"], 1, canvas[0] * canvas[1], canvas=canvas),
        template="fuyu",
        layout="fuyu",
        coords="1d",
    )
    for number, (pixels, words) in enumerate(zip(golden.pictures, golden.config["texts"], strict=True)):
        document = rules.prompt(Example("x", "golden", (Image(png(pixels)), Text(words, "user"))))
        np.testing.assert_array_equal(document.tokens, golden.preprocess[f"img{number}.input_ids"])
        is_patch = document.kinds == schema.PATCH
        index = np.where(is_patch, np.cumsum(is_patch) - 1, -1)
        recorded = golden.preprocess[f"img{number}.image_patches_indices"]
        np.testing.assert_array_equal(index, recorded[: len(index)])
        assert (recorded[len(index) :] == -1).all()
        assert not document.loss_weights.any()
    answered = rules.document(
        Example("x", "golden", (Image(png(pixels)), Text(words, "user"), Text("yes", "assistant", True)))
    )
    n = len(document.tokens)
    np.testing.assert_array_equal(answered.tokens[:n], document.tokens)
    learnt = answered.targets[answered.loss_weights > 0]
    assert len(learnt) == len("\u2581yes|") and (learnt == answered.tokens[n:]).all()


@pytest.mark.parametrize("words", ["<box>1, 2, 3</box>", "<point>1</point>", "<box>a, b, c, d</box>"])
def test_fuyu_refuses_places_that_are_none(words):
    with pytest.raises(Reject) as rejected:
        TEMPLATES["fuyu"]([Image(b""), Text(words, "user")], [1.0], False)
    assert rejected.value.reason == "bad_place"


def test_fuyu_points():
    pieces = TEMPLATES["fuyu"]([Image(b""), Text("at <point>6, 9</point>.", "user")], [0.5], True)
    assert [p.text for p in pieces[2:]] == [
        "at ",
        "<0x02>",
        "2",
        "2",
        "<0x03>",
        ".",
        "<0x04>",
    ]  # 1.5 and 2.25
    assert [p.special for p in pieces[2:]] == [False, True, True, True, True, False, True]


# Templates without recordings


def words_of(name: str, spans, prompt: bool = False) -> str:
    """Pieces run together, what is learnt in braces."""
    scales = [1.0] * sum(isinstance(span, Image) for span in spans)
    pieces = TEMPLATES[name](spans, scales, prompt)
    return "".join(f"{{{p.text}}}" if p.supervised else p.text for p in pieces).replace("}{", "")


CHAT = (
    Text("Be brief.", "system"),
    Image(b""),
    Text("\nWhat? ", "user"),
    Text("Cat", "assistant", True),
    Text("Sure?", "user"),
    Text("Yes", "assistant", True),
)


@pytest.mark.parametrize(
    ("name", "expected"),
    {
        "solo_sft": "<image><s>[INST] Be brief.\n\nWhat? [/INST]{Cat</s>}[INST] Sure? [/INST]{Yes</s>}",
        "vicuna": "<s>Be brief. USER: <image>\nWhat? ASSISTANT:{ Cat</s>}USER: Sure? ASSISTANT:{ Yes</s>}",
        "evev2": "Be brief. USER: <image>\nWhat? ASSISTANT:{ Cat<|im_end|>}"
        "USER: Sure? ASSISTANT:{ Yes<|im_end|>}",
        "fuyu": "<image><s>Be brief.\nWhat? <0x04>{Cat|ENDOFTEXT|}Sure?<0x04>{Yes|ENDOFTEXT|}",
        "plain": "Be brief.<image>\nWhat? {Cat}Sure?{Yes<|im_end|>}",
        "eve_plain": "<s><image>{CatYes\n}",
    }.items(),
)
def test_conversation(name, expected):
    assert words_of(name, CHAT) == expected
    if name not in ("plain", "eve_plain"):  # the prompt is the conversation up to the answer
        question = words_of(name, CHAT[:-1], prompt=True).replace("{", "").replace("}", "")
        answered = expected.replace("{", "").replace("}", "")
        assert answered.startswith(question) and answered[len(question) :].strip().startswith("Yes")


def test_a_caption_without_roles_is_a_question_and_its_answer():
    spans = (Image(b""), Text("en: "), Text("a cat", supervised=True))
    expected = "<|im_start|>user\n<image>en: <|im_end|>\n<|im_start|>assistant\n{a cat<|im_end|>\n}"
    assert words_of("chatml", spans) == expected
    assert words_of("plain", spans) == "<image>en: {a cat<|im_end|>}"
    assert words_of("plain", spans[:2], prompt=True) == "<image>en: "


def test_images_belong_to_the_users_turn_beside_them():
    image, user, assistant = Image(b""), Text("q", "user"), Text("a", "assistant", True)
    shapes = {
        (image, assistant): [("user", 1), ("assistant", 0)],
        (user, image, assistant): [("user", 1), ("assistant", 0)],
        (image, user, image, user, assistant): [("user", 2), ("assistant", 0)],
        (user, assistant, image, user): [("user", 0), ("assistant", 0), ("user", 1)],
        (user, assistant, image, assistant): [("user", 0), ("assistant", 1)],
        (user, assistant, image): [("user", 0), ("assistant", 0), ("user", 1)],
        (Text("s", "system"), image, image, assistant): [("system", 0), ("user", 2), ("assistant", 0)],
    }
    for spans, expected in shapes.items():
        assert [(turn.role, turn.num_images) for turn in turns(spans)] == expected
    # A turn that is given and one that is learnt stay apart, as NEO's is_input asks.
    given = Text("b", "assistant")
    assert [turn.supervised for turn in turns((user, given, assistant))] == [False, False, True]


def test_video_frames_carry_their_times():
    spans = (
        Image(b"", 0.0),
        Image(b"", 75.256),
        Text("What happens?", "user"),
        Text("It", "assistant", True),
    )
    for name in ("chatml", "vicuna"):
        written = words_of(name, template.with_timestamps(spans))
        assert "[00:00.00]:<image>\n[01:15.26]:<image>\nWhat happens?" in written
    assert template.with_timestamps(spans[2:]) == list(spans[2:])
    assert template.with_numbers(spans) == list(spans)


def test_images_are_numbered_on_request():
    spans = (Image(b""), Text(" and ", "user"), Image(b""), Text("?", "user"), Text("a", "assistant", True))
    written = words_of("chatml", template.with_numbers(spans))
    assert "user\nImage-1: <image>\n and Image-2: <image>\n?<|im_end|>" in written
    assert template.with_numbers(spans[:2]) == list(spans[:2])


def test_joined_pieces_meet_inside_a_token(tmp_path):
    """A token that begins before a border and ends behind it belongs to the piece it ends in."""
    from data_pipelines import text

    path = tmp_path / "tokenizer.json"
    path.write_text(text.train_tokenizer([" Cat Cat Cat Cat: Cat"] * 9, 280))
    tokenizer = text.Tokenizer(path)
    whole = tokenizer.encode("A: Cat")
    assert len(tokenizer.encode("A:")) + len(tokenizer.encode(" Cat")) >= len(whole)
    document = text.build_document(
        tokenizer, [], [Piece("A:"), Piece(" Cat", supervised=True, joined=True)], coords="1d"
    )
    np.testing.assert_array_equal(document.tokens, whole)
    learnt = tokenizer.decode(document.targets[document.loss_weights > 0])
    assert learnt.endswith("Cat") and "A" not in learnt
