"""The import command: NEO's recorded checkpoint, growth from a language model, and folders that are wrong."""

import json
import pickle
import shutil

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import load_file, save_file

from configs import base
from neo_jax import config as config_lib, grow, params as params_lib, restore, workdir as workdir_lib
from neo_jax.convert import files, import_, neo, ours, table
from neo_jax.convert.__main__ import main
from neo_jax.errors import UserError
from neo_jax.model.transformer import Transformer
from tests.neo_jax.test_convert_backbones import TOKENS, logits


def loaded(workdir):
    """(config, params) of a workdir."""
    config = workdir_lib.load_config(workdir)
    load = ours.loader(restore.checkpoint_folder(workdir))
    return config, {path: load(path) for path in params_lib.abstract(Transformer(config.model))}


@pytest.fixture
def neo_folder(golden_dir, tmp_path):
    """The recorded NEO checkpoint, laid out as a folder on the hub."""
    folder = tmp_path / "hf"
    folder.mkdir()
    shutil.copyfile(golden_dir("neo") / "config.json", folder / "config.json")
    shutil.copyfile(golden_dir("neo") / "weights.safetensors", folder / "model.safetensors")
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def test_neo(neo_folder, tmp_path):
    """Import gives the recorded tensors; export, import, export again the same bytes, in any shards."""
    main(["import", f"--hf={neo_folder}", f"--out={tmp_path / 'run'}"])
    config, params = loaded(tmp_path / "run")
    assert (tmp_path / "run" / "tokenizer_config.json").exists()
    hf = json.loads((neo_folder / "config.json").read_text())
    stage = config.stage[config.stages[0]]
    assert [stage.min_pixels, stage.max_pixels] == [
        hf["vision_config"][f"{end}_pixels"] for end in ("min", "max")
    ]
    rows = list(neo.table(config.model))
    recorded = load_file(neo_folder / "model.safetensors")
    for name, tensor in table.to_hf(rows, params).items():
        np.testing.assert_array_equal(tensor, recorded.pop(name))
    assert not recorded

    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir(), second.mkdir()
    files.write_folder(first, rows, params.get, max_shard=200_000)
    assert {name: x.tobytes() for name, x in _all(first).items()} == {
        name: x.tobytes() for name, x in _all(neo_folder).items()
    }
    index = json.loads((first / files.INDEX).read_text())
    assert len(set(index["weight_map"].values())) > 2
    for file in set(index["weight_map"].values()):  # the format's own library reads them
        for name, tensor in load_file(first / file).items():
            np.testing.assert_array_equal(tensor, files.open_folder(first)[name].read())
    shutil.copyfile(neo_folder / "config.json", first / "config.json")
    main(["import", f"--hf={first}", f"--out={tmp_path / 'again'}"])
    load = ours.loader(tmp_path / "again" / "checkpoints" / "0")
    files.write_folder(second, rows, load, max_shard=200_000)
    for path in sorted(second.iterdir()):
        assert path.read_bytes() == (first / path.name).read_bytes()


def _all(folder):
    return {name: tensor.read() for name, tensor in files.open_folder(folder).items()}


def test_bfloat16_is_read_and_written(neo_folder, tmp_path):
    """bf16 files give the float32 values they stand for, and come out again as they were."""
    main(["import", f"--hf={neo_folder}", f"--out={tmp_path / 'run'}"])
    config, params = loaded(tmp_path / "run")
    rows, half = list(neo.table(config.model)), tmp_path / "half"
    half.mkdir()
    files.write_folder(half, rows, params.get, dtype="bfloat16")
    shutil.copyfile(neo_folder / "config.json", half / "config.json")
    main(["import", f"--hf={half}", f"--out={tmp_path / 'rounded'}"])
    rounded = loaded(tmp_path / "rounded")[1]
    for path, values in rounded.items():
        np.testing.assert_array_equal(values, params[path].astype(files.DTYPES["BF16"]).astype(np.float32))
    assert any((rounded[path] != params[path]).any() for path in params)
    again = tmp_path / "again"
    again.mkdir()
    files.write_folder(again, rows, rounded.get, dtype="bfloat16")
    assert (again / "model.safetensors").read_bytes() == (half / "model.safetensors").read_bytes()


@pytest.mark.parametrize("section", ["vision_config", "llm_config"])
def test_traps_of_neo_configs(neo_folder, section):
    """1-element lists, a wrong model_type, no extra_num_layers, odd layer_types (spec, section 1)."""
    hf = json.loads((neo_folder / "config.json").read_text())
    expected = neo.model_changes(hf)
    hf["model_type"] = "internvl_chat"
    hf["llm_config"]["layer_types"] = ["full_attention"] * 32
    hf[section] = {
        key: [value] if isinstance(value, (int, float)) else value for key, value in hf[section].items()
    }
    (neo_folder / "config.json").write_text(json.dumps(hf))
    source = import_.Source(neo_folder)
    assert source.family_name == "neo" and neo.model_changes(source.hf) == expected
    del hf["llm_config"]["extra_num_layers"]
    assert neo.model_changes(hf) == expected | {"pre_buffer": 0}


# Ties


def ties(folder, says, head):
    """Sets what config.json says about ties, and the head: "same" as the embedding, "other" or "absent"."""
    hf = json.loads((folder / "config.json").read_text())
    for section in (hf, hf["llm_config"]):
        section.pop("tie_word_embeddings", None)
        if says is not None:
            section["tie_word_embeddings"] = says
    (folder / "config.json").write_text(json.dumps(hf))
    tensors = load_file(folder / "model.safetensors")
    name, embed = "language_model.lm_head.weight", tensors["language_model.model.embed_tokens.weight"]
    tensors |= {"same": {name: embed}, "other": {name: embed + 1}, "absent": {}}[head]
    if head == "absent":
        tensors.pop(name)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("says", "head", "tied"),
    [
        (True, "absent", True),
        (None, "absent", True),
        (True, "same", True),
        (True, "other", False),
        (False, "same", False),
        (False, "other", False),
        (None, "other", False),
    ],
)
def test_ties_follow_the_weights(neo_folder, says, head, tied):
    ties(neo_folder, says, head)
    source = import_.Source(neo_folder)
    assert source.model.tie_embeddings == tied and ("head" in source.specs) != tied
    assert bool(source.note) == (says is True and head == "other")


def test_head_missing_from_an_untied_model(neo_folder, tmp_path):
    ties(neo_folder, False, "absent")
    refused(
        neo_folder,
        tmp_path,
        r"lm_head.weight is missing, .* not tied to .*embed_tokens.weight of shape \(320, 64\)",
    )


# From a language model


@pytest.fixture
def grown(golden_dir, tmp_path):
    """(config, params, recorded expectation) of a NEO grown from the recorded plain Qwen3."""
    folder = golden_dir("neo") / "init_from_llm"
    notes = json.loads((folder / "config.json").read_text())
    hf = tmp_path / "llm"
    hf.mkdir()
    (hf / "config.json").write_text(json.dumps(notes["base_config"]))
    shutil.copyfile(folder / "base_llm.safetensors", hf / "model.safetensors")
    source = import_.Source(hf)
    c = base.get_config()
    c.model.update(ConfigDict(source.model))
    c.model.update_from_flattened_dict(
        {
            "num_layers": notes["neo_num_hidden_layers"],
            "pre_buffer": notes["extra_num_layers"],
            "tie_embeddings": False,
            "mask": "image_bidirectional",
            "embed.kind": "conv_gelu_conv",
            "coords.kind": "thw",
            "coords.rope_theta_hw": notes["rope_theta_hw"],
        }
    )
    c.data.vocab_size = c.model.vocab_size
    c.stages = ("only",)
    c.stage.only = base.stage(1, warmup_steps=0)
    return hf, c, folder


def test_neo_from_a_language_model(grown, tmp_path):
    """The reference's loader made neo_expected of base_llm; the pre-buffer is compared by statistics."""
    hf, c, folder = grown
    import_.run(hf, tmp_path / "run", config_lib.resolve(c))
    config, params = loaded(tmp_path / "run")
    tensors = {
        name.removeprefix("language_model."): x
        for name, x in table.to_hf(neo.table(config.model), params).items()
    }
    expected = load_file(folder / "neo_expected.safetensors")
    for name, tensor in expected.items():
        np.testing.assert_array_equal(tensors[name], tensor, err_msg=name)
    statistics = json.loads((folder / "prebuffer_stats.json").read_text())["params"]
    for name, recorded in statistics.items():
        tensor = tensors[name]
        assert list(tensor.shape) == recorded["shape"]
        if recorded["all_ones"]:
            assert (tensor == 1).all()
        else:  # 5 standard errors of both samples
            error = 5 * np.sqrt(2 / tensor.size)
            assert abs(tensor.std() / recorded["std"] - 1) < error
            assert abs(tensor.mean() - recorded["mean"]) < 0.02 * error
    left = {name for name in tensors if name not in expected and name not in statistics}
    assert all(name.startswith("vision_model.") for name in left)


def test_grown_model_is_its_base_on_text(grown, tmp_path):
    """With a pre-buffer that adds nothing, text logits are the language model's (K_hw = 0)."""
    hf, c, _ = grown
    source = import_.run(hf, tmp_path / "llm_run")
    tokens = TOKENS % source.model.vocab_size
    expected = logits(*loaded(tmp_path / "llm_run"), tokens)
    import_.run(hf, tmp_path / "zero", config_lib.resolve(c), zero_pre_buffer=True)
    np.testing.assert_allclose(logits(*loaded(tmp_path / "zero"), tokens), expected, rtol=0, atol=1e-5)
    c.model.pre_buffer, c.model.num_layers = 0, c.model.num_layers - c.model.pre_buffer
    import_.run(hf, tmp_path / "none", config_lib.resolve(c))
    np.testing.assert_allclose(logits(*loaded(tmp_path / "none"), tokens), expected, rtol=0, atol=1e-5)


def test_vocabularies_of_other_sizes(grown, tmp_path):
    """Rows are copied up to the smaller size, the rest is zero."""
    hf, c, _ = grown
    words = load_file(hf / "model.safetensors")["model.embed_tokens.weight"]
    for size in (len(words) + 6, len(words) - 6):
        c.model.vocab_size = c.data.vocab_size = size
        import_.run(hf, tmp_path / str(size), config_lib.resolve(c))
        params = loaded(tmp_path / str(size))[1]
        for matrix in (params["token_embed"], params["head"].T):
            np.testing.assert_array_equal(matrix[: len(words)], words[:size])
            assert len(matrix) == size and not matrix[len(words) :].any()


def test_routed_copies(grown, tmp_path):
    """Both copies of a routed model start from the one of its base, which it therefore is (EVEv2 3.4)."""
    hf, c, _ = grown
    import_.run(hf, tmp_path / "llm_run")
    llm, params = loaded(tmp_path / "llm_run")
    c.model = ConfigDict(llm.model)
    c.model.route.update({"attention": "modality", "mlp": "modality", "norm": "modality"})
    specs = params_lib.abstract(Transformer(c.model))
    origins = grow.plan({path: x.shape for path, x in params.items()}, specs)
    routed = grow.grow(origins, specs, params, jax.random.key(0))
    assert any("/visual/" in path for path in routed)
    for path, values in routed.items():
        np.testing.assert_array_equal(values, params[path.replace("/visual/", "/").replace("/text/", "/")])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_size", 64, r"has shape \(64, 64\) in the config's model, but \((32, 64|64, 32)\)"),
        ("num_layers", 4, r"layers/attention.* has shape \(3, .*, but \(2, "),
        ("norm_eps", 1e-5, "norm_eps is 1e-05, but the model to start from has 1e-06"),
        ("coords.rope_theta", 1e4, "rope_theta is 10000.0, but"),
        ("attention_bias", ("q",), "has no layers/attention/qkv/q/bias, which the config's model needs"),
    ],
)
def test_a_base_that_does_not_fit(grown, tmp_path, field, value, message):
    hf, c, _ = grown
    c.model.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=message):
        import_.run(hf, tmp_path / "run", config_lib.resolve(c))
    assert not list(tmp_path.glob("*run*"))


# Folders that are wrong


def refused(folder, tmp_path, message):
    """Import refuses the folder with this message, and leaves nothing behind."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=message) as caught:
        main(["import", f"--hf={folder}", f"--out={tmp_path / 'out'}"])
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


NAME = "language_model.model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NAME), rf"model.safetensors: lacks 1 tensors .* first {NAME} of shape \(112, 64\)"),
        (
            lambda t: t.update(more=np.zeros((2, 3))),
            r"model.safetensors: 1 tensors .* more of shape \(2, 3\)",
        ),
        (
            lambda t: t.update({NAME: t[NAME][:3].copy()}),
            rf"model.safetensors: tensor {NAME} has shape \(3, 64\), but config.json makes it \(112, 64\)",
        ),
        (lambda t: t.update({NAME: t[NAME].astype(np.int32)}), rf"{NAME} is of type I32, not floating point"),
    ],
)
def test_tensors_that_do_not_fit(neo_folder, tmp_path, change, message):
    tensors = load_file(neo_folder / "model.safetensors")
    change(tensors)
    save_file(tensors, neo_folder / "model.safetensors")
    refused(neo_folder, tmp_path, message)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_hidden_layers", 3, r"tensors have no place in config.json's model, first .*layers\.3\."),
        ("num_hidden_layers", 5, r"lacks .* tensors that config.json asks for, first .*layers\.4\."),
        ("intermediate_size", 100, r"has shape \(112, 64\), but config.json makes it \(100, 64\)"),
        ("vocab_size", [320, 321], r"config.json: vocab_size should be of type int, but is \[320, 321\]"),
        ("hidden_size", "64", "config.json: hidden_size should be of type int, but is '64'"),
        ("rope_scaling", {"rope_type": "yarn"}, "config.json: rotary positions of type 'yarn'"),
        ("hidden_act", "gelu", "config.json: hidden_act 'gelu' is not supported"),
        ("num_attention_heads", None, "config.json: num_attention_heads is missing"),
    ],
)
def test_configs_that_disagree(neo_folder, tmp_path, field, value, message):
    hf = json.loads((neo_folder / "config.json").read_text())
    hf["llm_config"][field] = value
    (neo_folder / "config.json").write_text(json.dumps(hf))
    refused(neo_folder, tmp_path, message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model_type": "gpt2"}', r"config.json: no known family \(model_type 'gpt2'"),
        ('{"model_type": "neo_chat"}', "config.json: llm_config should be an object"),
        ("{", "config.json: not JSON"),
        ("[]", "config.json: should hold an object"),
    ],
)
def test_config_files_that_are_wrong(neo_folder, tmp_path, text, message):
    (neo_folder / "config.json").write_text(text)
    refused(neo_folder, tmp_path, message)


@pytest.mark.parametrize("left", [0, 5, 500, -1000, -1])
def test_truncated_files(neo_folder, tmp_path, left):
    file = neo_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    refused(neo_folder, tmp_path, r"model.safetensors: .*cut off")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"not json", "header is damaged"),
        (b'{"x": {}}', "header is damaged"),
        (b'{"x": {"dtype": "F8", "shape": [1], "data_offsets": [0, 1]}}', "tensor x is of type F8"),
        (
            b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
            r"of shape \(2,\) should have 8 bytes",
        ),
        (b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}', "should have 4 bytes"),
    ],
)
def test_damaged_headers(neo_folder, tmp_path, header, message):
    data = len(header).to_bytes(8, "little") + header + bytes(64)
    (neo_folder / "model.safetensors").write_bytes(data)
    refused(neo_folder, tmp_path, f"model.safetensors: .*{message}")


def test_pickles_are_never_loaded(neo_folder, tmp_path):
    (neo_folder / "model.safetensors").unlink()
    refused(neo_folder, tmp_path, "no safetensors files")
    marker = tmp_path / "ran"

    class Trap:
        def __reduce__(self):
            return (marker.touch, ())

    (neo_folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    refused(neo_folder, tmp_path, r"pytorch_model.bin: a pickle.*never read")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(extra="model.safetensors"), "model.safetensors: has no tensor extra, which"),
        (lambda m: m.pop(NAME), f"tensor {NAME} is not the one that"),
        (lambda m: m.update({NAME: "gone.safetensors"}), "gone.safetensors: No such file"),
        (lambda m: m.update({NAME: "../model.safetensors"}), "is not the name of a safetensors file"),
        (lambda m: m.update({NAME: "model.bin"}), "is not the name of a safetensors file"),
        (lambda m: m.update({NAME: 3}), "weight_map should map tensor names to file names"),
    ],
)
def test_an_index_that_is_wrong(neo_folder, tmp_path, change, message):
    weight_map = dict.fromkeys(files.open_folder(neo_folder), "model.safetensors")
    change(weight_map)
    (neo_folder / files.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    refused(neo_folder, tmp_path, message)


def test_nothing_is_overwritten_or_left_half_written(neo_folder, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    refused(neo_folder, tmp_path, "exists and is not empty")
    assert (tmp_path / "out" / "mine").read_text() == "keep"

    shutil.rmtree(tmp_path / "out")
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(ours.ocp.partial, "finalize", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["import", f"--hf={neo_folder}", f"--out={tmp_path / 'out'}"])
    assert sorted(tmp_path.iterdir()) == before
