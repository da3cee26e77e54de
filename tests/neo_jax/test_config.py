"""Configs: what is accepted, what is refused and in which words, and that a config keeps its identity."""

import argparse
import ast
import inspect
import json
import re
import subprocess
import sys
import tokenize
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from hypothesis import given, strategies as st
from ml_collections import ConfigDict, FrozenConfigDict

from configs import base
from neo_jax import config as config_lib, validate
from neo_jax.errors import UserError

ROOT = Path(__file__).parent.parent.parent


def experiment(sources: bool = False) -> ConfigDict:
    """Two stages over the base config; with `sources`, one to evaluate on beside the two of the mixtures."""
    config = base.get_config()
    config.stages = ("warm", "full")
    config.stage.warm = base.stage(200, trainable=("embed/.*", r"pre/.*"), mixture={"noto": 2, "fluent": 1.0})
    config.stage.full = base.stage(400)
    if sources:
        config.data.tokenizer = "tokenizer.json"
        config.data.sources.full = base.source("parquet", "gs://bucket/full", split="val")
        for name in ("noto", "fluent"):
            config.data.sources[name] = base.source("webdataset", name)
    return config


def refused(*overrides: str, sources: bool = False) -> str:
    """The message with which `experiment` is refused under overrides "field=value"."""
    pairs = [tuple(override.split("=", 1)) for override in overrides]
    with pytest.raises(UserError) as caught:
        config_lib.resolve(experiment(sources), pairs)
    return str(caught.value)


@pytest.fixture
def config_file(tmp_path: Path) -> Callable[[str], str]:
    """Writes a config file whose get_config holds the given statement on line 6; returns its path."""

    def write(statement: str) -> str:
        lines = [
            "from configs import base",
            'def get_config(arg=""):',
            "    c = base.get_config()",
            '    c.stages = ("full",)',
            "    c.stage.full = base.stage(400)",
            f"    {statement}",
            "    return c",
        ]
        path = tmp_path / "experiment.py"
        path.write_text("\n".join(lines))
        return str(path)

    return write


# Schema


def test_every_field_of_base_has_a_comment() -> None:
    source = inspect.getsource(base)
    commented = {
        token.start[0]
        for token in tokenize.generate_tokens(StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
            # Sections are described by their own function or by the comments of their fields.
            if isinstance(node.value, ast.Call) and not node.value.args:
                continue
            assert node.lineno in commented, (
                f"configs/base.py:{node.lineno}: {ast.unparse(node)} has no comment"
            )


def test_choices_and_ranges_name_fields_of_base() -> None:
    resolved = config_lib.resolve(experiment(sources=True))
    fields = {
        re.sub(r"(mixture|objectives)\..*", r"\1.*", re.sub(r"^(stage|data\.sources)\.\w+", r"\1.*", field))
        for field, _ in config_lib._leaves(config_lib._plain(resolved))
    }
    assert fields >= set(validate.CHOICES) | set(validate._RANGES) | validate._MAY_BE_EMPTY


def test_config_imports_no_jax() -> None:
    code = "import sys, neo_jax.config; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_resolved_config_is_frozen_and_normalised() -> None:
    config = experiment()
    config.stage.full.peak_lr = 1
    config.data.locales = ["en", "de"]
    resolved = config_lib.resolve(config)
    assert isinstance(resolved, FrozenConfigDict)
    assert type(resolved.stage.full.peak_lr) is float
    assert resolved.data.locales == ("en", "de")
    assert resolved.stage.warm.mixture.to_dict() == {"noto": 2.0, "fluent": 1.0}
    with pytest.raises(AttributeError, match="immutable"):
        resolved.seed = 1


# Unknown fields


@pytest.mark.parametrize(
    ("field", "nearest"),
    [
        ("model.num_layer", "model.num_layers"),
        ("modle.num_layers", "model.num_layers"),
        ("model.patch_size", "model.embed.patch_size"),
        ("model.num_layers.x", "model.num_layers"),
        ("sede", "seed"),
        ("stage.full.batchsize", "stage.full.batch_size"),
        ("stage.ful.steps", "stage.full.steps"),
        ("model", None),
    ],
)
def test_unknown_field_in_override(field: str, nearest: str | None) -> None:
    message = refused(f"{field}=3")
    if nearest is None:
        assert message == f"--config.{field}: expected fields of its own, got 3"
    else:
        assert message == f"--config.{field}: no such field; did you mean {nearest}?"


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("c.model.num_layer = 3", "model.num_layer: no such field; did you mean model.num_layers?"),
        ("c.modle = 3", "modle: no such field; did you mean model?"),
        (
            "c.stage.full.warmup = 3",
            "stage.full.warmup: no such field; did you mean stage.full.warmup_steps?",
        ),
        ("c.model = 3", "line 6: TypeError: "),
        ("del c.model.norm_eps", "model.norm_eps: missing; start from base.get_config() and base.stage()"),
        ("c.model.num_layers = 'six'", "line 6: TypeError: Could not override field 'num_layers'"),
        ("c.stage.full = base.stage(9, batchsize=2)", "line 6: ValueError: stage() has no field 'batchsize'"),
        ("c.modle.num_layers = 3", "line 6: AttributeError: "),
        ("return 3", "expected a config (ConfigDict) from get_config(), got int"),
        ("c.stage['a-b'] = base.stage(9)", "stage.a-b: a stage name is made of letters, digits and _"),
        ("c.seed = (", "line 6: SyntaxError: "),
        ("import nowhere", "line 6: ModuleNotFoundError: No module named 'nowhere'"),
    ],
)
def test_mistake_in_config_file(
    config_file: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, statement: str, message: str
) -> None:
    path = config_file(statement)
    monkeypatch.chdir(Path(path).parent)
    for named in (path, Path(path).name):
        with pytest.raises(UserError, match="^" + re.escape(f"{named}: {message}")):
            config_lib.load(named)


# Types


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.num_layers=six", "model.num_layers: expected int, got 'six' (str)"),
        ("model.num_layers=6.0", "model.num_layers: expected int, got 6.0 (float)"),
        ("model.num_layers=True", "model.num_layers: expected int, got True (bool)"),
        ("model.norm_eps=tiny", "model.norm_eps: expected float, got 'tiny' (str)"),
        ("model.tie_embeddings=yes", "model.tie_embeddings: expected bool, got 'yes' (str)"),
        ("model.tie_embeddings=1", "model.tie_embeddings: expected bool, got '1' (str)"),
        ("data.locales=('en', 3)", "data.locales[1]: expected str, got 3 (int)"),
        ("model.embed.pixel_mean=a,b,c", "model.embed.pixel_mean[0]: expected float, got 'a' (str)"),
        ("stage.full.mixture=noto", "stage.full.mixture: expected fields of its own, got 'noto'"),
        ("stage.full.mixture.noto=much", "stage.full.mixture.noto: expected float, got 'much' (str)"),
        ("stage.full.mixture={'noto': '1'}", "stage.full.mixture.noto: expected float, got '1' (str)"),
    ],
)
def test_wrong_type(override: str, message: str) -> None:
    assert refused(override) == f"--config.{message}"


def test_wrong_type_from_outside_a_config_dict() -> None:
    config = config_lib._plain(experiment())
    config["data"]["locales"] = "en"
    with pytest.raises(UserError, match=r"^data\.locales: expected a tuple of str, got 'en'$"):
        config_lib.resolve(config)


def test_overrides_take_the_type_of_their_field() -> None:
    resolved = config_lib.resolve(
        experiment(),
        [
            ("model.num_layers", "1_0"),
            ("stage.full.peak_lr", "1"),
            ("stage.full.steps", "10"),
            ("stage.full.steps", "500"),
            ("model.tie_embeddings", "true"),
            ("data.augment", "False"),
            ("data.locales", "en, de"),
            ("stages", "full"),
            ("stage.warm.trainable", r"('layers/[0-9]{1,2}/.*',)"),
            ("model.embed.pixel_mean", "0,0.5,1e-1"),
            ("name", "a=b"),
            ("data.recipe", ""),
            ("stage.full.mixture", "{'noto': 1}"),
            ("stage.full.mixture.fluent", "3"),
            ("stage.warm.mixture.openmoji", "0.5"),
        ],
    )
    assert resolved.model.num_layers == 10
    assert type(resolved.stage.full.peak_lr) is float
    assert resolved.stage.full.steps == 500
    assert resolved.model.tie_embeddings is True
    assert resolved.data.augment is False
    assert resolved.data.locales == ("en", "de")
    assert resolved.stages == ("full",)
    assert resolved.stage.warm.trainable == ("layers/[0-9]{1,2}/.*",)
    assert resolved.model.embed.pixel_mean == (0.0, 0.5, 0.1)
    assert resolved.name == "a=b"
    assert resolved.data.recipe == ""
    assert resolved.stage.full.mixture.to_dict() == {"noto": 1.0, "fluent": 3.0}
    assert resolved.stage.warm.mixture.to_dict() == {"noto": 2.0, "fluent": 1.0, "openmoji": 0.5}


# Values and combinations


@pytest.mark.parametrize("field", sorted(validate.CHOICES))
def test_unknown_kind_lists_the_valid_ones(field: str) -> None:
    kinds = ", ".join(validate.CHOICES[field])
    name = field.replace("*", "full")
    message = refused(f"{name}=new", sources="sources" in field)
    assert message == f"{name}: 'new' is not a kind; choose from {kinds}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.hidden_size=0"], "model.hidden_size: must be positive, got 0"),
        (["stage.full.steps=-1"], "stage.full.steps: must be positive, got -1"),
        (["stage.full.peak_lr=nan"], "stage.full.peak_lr: must be positive, got nan"),
        (["stage.full.peak_lr=inf"], "stage.full.peak_lr: must be positive, got inf"),
        (["stage.full.min_lr_ratio=1.5"], "stage.full.min_lr_ratio: must be between 0 and 1, got 1.5"),
        (["stage.full.b2=1"], "stage.full.b2: must be at least 0 and below 1, got 1.0"),
        (["stage.full.warmup_steps=-1"], "stage.full.warmup_steps: must be at least 0, got -1"),
        (["stage.full.mixture.noto=-1"], "stage.full.mixture.noto: must be at least 0, got -1.0"),
        (
            ["stage.full.mixture={'noto': 0}"],
            "stage.full.mixture: needs a source with a positive weight at step 0",
        ),
        (["stage.full.mixture={}"], "stage.full.mixture: needs a source with a positive weight at step 0"),
        (["seed=2147483648"], "seed: must be between 0 and 2**31 - 1, got 2147483648"),
        (["model.embed.pixel_std=1,0,1"], "model.embed.pixel_std: must be positive, got (1.0, 0.0, 1.0)"),
        (["model.embed.pixel_std=1,1"], "model.embed.pixel_std: expected 3 values (RGB), got (1.0, 1.0)"),
        (["data.locales="], "data.locales: must not be empty"),
        (["name="], "name: must not be empty"),
        (
            ["model.num_heads=6", "model.num_kv_heads=4"],
            "model.num_kv_heads: 4 does not divide model.num_heads = 6",
        ),
        (
            ["model.reduce_dtype=bfloat16"],
            "model.reduce_dtype: 'bfloat16' is neither 'float32' nor model.dtype = 'float32'",
        ),
        (
            ["model.head_dim=62"],
            "model.head_dim: 62 is not divisible by 4, for coords.kind 'thw'",
        ),
        (["model.pre_buffer=7"], "model.pre_buffer: 7 layers are more than model.num_layers = 6"),
        (
            ["model.embed.hidden_size=130"],
            "model.embed.hidden_size: 130 is not divisible by 4, as embed.kind 'conv_gelu_conv' needs",
        ),
        (["data.vocab_size=4096"], "model.vocab_size: 2048 is less than data.vocab_size = 4096"),
        (
            ["mesh.data=2", "mesh.tensor=2"],
            "mesh.num_devices: 1 is not the product of "
            "mesh.context = 1, mesh.data = 2, mesh.fsdp = 1, mesh.tensor = 2",
        ),
        (["stages=full,worm"], "stages: no stage 'worm'; did you mean warm?"),
        (["stages=full,full"], "stages: ('full', 'full') names a stage twice"),
        (["stages="], "stages: must not be empty"),
        (
            ["stage.full.trainable=('embed/(',)"],
            "stage.full.trainable: 'embed/(' is not a regular expression: missing ), unterminated subpattern "
            "at position 6",
        ),
        (["stage.full.trainable="], "stage.full.trainable: must not be empty"),
        (
            ["stage.full.accumulate=3"],
            "stage.full.batch_size: 8 is not divisible by stage.full.accumulate = 3",
        ),
        (
            [
                "mesh.num_devices=4",
                "mesh.data=2",
                "mesh.fsdp=2",
                "stage.full.accumulate=4",
                "stage.warm.accumulate=2",
            ],
            "stage.full.batch_size: 8 is not divisible by stage.full.accumulate * mesh.data * mesh.fsdp = 16",
        ),
        (
            ["stage.full.min_pixels=16385"],
            "stage.full.min_pixels: 16385 is more than stage.full.max_pixels = 16384",
        ),
        (
            ["stage.full.min_pixels=100", "stage.full.max_pixels=1000"],
            "stage.full.max_pixels: 1000 is less than one image token: "
            "(model.embed.patch_size * model.embed.merge_size)**2 = 1024",
        ),
        (
            ["stage.full.row_patches=15"],
            "stage.full.row_patches: 15 is less than the 16 tokens of one image of "
            "stage.full.max_pixels = 16384",
        ),
        (
            ["stage.full.row_tokens=33"],
            "stage.full.row_tokens: 33 is less than 34: one image of 16 tokens "
            "(stage.full.max_pixels = 16384), its two markers and a caption of 16",
        ),
        (["stage.full.warmup_steps=401"], "stage.full.warmup_steps: 401 is more than stage.full.steps = 400"),
    ],
)
def test_value_refused(overrides: list[str], message: str) -> None:
    assert refused(*overrides) == message


def test_limits_themselves_are_accepted() -> None:
    config_lib.resolve(
        experiment(),
        [
            ("model.pre_buffer", "6"),
            ("model.num_kv_heads", "4"),
            ("stage.full.row_patches", "16"),
            ("stage.full.row_tokens", "34"),
            ("stage.full.warmup_steps", "400"),
            ("stage.full.accumulate", "2"),
            ("mesh.num_devices", "4"),
            ("mesh.data", "2"),
            ("mesh.fsdp", "2"),
            ("stage.full.min_lr_ratio", "1"),
            ("stage.full.weight_decay", "0"),
            ("eval.splits", ""),
        ],
    )


def test_no_stage_defined() -> None:
    config = base.get_config()
    config.stages = ("full",)
    with pytest.raises(UserError, match=r"^stages: no stage 'full'; config\.stage is empty$"):
        config_lib.resolve(config)


@given(st.integers(1, 64), st.integers(1, 64))
def test_accepted_exactly_when_kv_heads_divide_heads(num_heads: int, num_kv_heads: int) -> None:
    overrides = [("model.num_heads", str(num_heads)), ("model.num_kv_heads", str(num_kv_heads))]
    if num_heads % num_kv_heads == 0:
        assert config_lib.resolve(experiment(), overrides).model.num_heads == num_heads
    else:
        with pytest.raises(UserError, match="does not divide"):
            config_lib.resolve(experiment(), overrides)


@given(st.text("abcdefghijklmnopqrstuvwxyz_.", min_size=1))
def test_any_unknown_field_is_refused_with_a_field_that_exists(field: str) -> None:
    schema = config_lib._schema(config_lib._plain(experiment()))
    fields = set(config_lib._fields(schema))
    if field not in fields:
        found = re.fullmatch(r"--config\..*: no such field; did you mean (\S+)\?", refused(f"{field}=1"))
        assert found is not None
        assert found[1] in fields


# Files and the command line


def test_config_file_with_argument_and_overrides(config_file: Callable[[str], str]) -> None:
    path = config_file("c.name = arg or 'plain'")
    assert config_lib.load(path).name == "plain"
    assert config_lib.load(f"{path}:smoke").name == "smoke"
    assert config_lib.load(f"{path}:smoke", [("name", "mine")]).name == "mine"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere.py", "--config=nowhere.py: no such file"),
        ("nowhere.py:smoke", "--config=nowhere.py:smoke: no such file"),
        ("config.json", "--config=config.json: a config is a Python file, FILE.py or FILE.py:ARG"),
    ],
)
def test_no_config_file(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        config_lib.load(spec)


def test_config_file_without_get_config(tmp_path: Path) -> None:
    path = tmp_path / "empty.py"
    path.touch()
    with pytest.raises(UserError, match=re.escape(f"{path}: has no function get_config()")):
        config_lib.load(str(path))


def test_config_file_that_takes_no_argument(tmp_path: Path) -> None:
    path = tmp_path / "fixed.py"
    path.write_text("def get_config():\n    pass\n")
    with pytest.raises(
        UserError, match=re.escape(f"{path}: TypeError: get_config() takes 0 positional arguments")
    ):
        config_lib.load(f"{path}:smoke")


def test_parse_args_separates_overrides_from_flags() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workdir")
    argv = ["--config=a.py:x", "--config.model.num_layers=3", "--workdir", "w", "--config.name=b=c"]
    args = config_lib.parse_args(parser, argv)
    assert (args.config, args.workdir) == ("a.py:x", "w")
    assert args.overrides == (("model.num_layers", "3"), ("name", "b=c"))


def test_parse_args_without_config() -> None:
    args = config_lib.parse_args(argparse.ArgumentParser(), [], required=False)
    assert (args.config, args.overrides) == (None, ())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--config.seed", "3"], "--config.seed: write --config.seed=VALUE"),
        ([], "the following arguments are required: --config"),
        (["--config=a.py", "--sede=3"], "unrecognized arguments: --sede=3"),
    ],
)
def test_parse_args_usage(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        config_lib.parse_args(argparse.ArgumentParser(), argv)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


# Identity


def test_json_round_trip_is_exact() -> None:
    resolved = config_lib.resolve(experiment(), [("stage.full.peak_lr", "0.1"), ("model.norm_eps", "1e-7")])
    again = config_lib.from_json(config_lib.to_json(resolved))
    assert again == resolved
    assert repr(config_lib._plain(again)) == repr(config_lib._plain(resolved))
    assert config_lib.config_hash(again) == config_lib.config_hash(resolved)
    assert config_lib.resolve(resolved) == resolved


@given(
    st.floats(1e-30, 1e30),
    st.integers(0, 2**31 - 1),
    st.lists(st.text(min_size=1), min_size=1),
    st.booleans(),
)
def test_json_round_trip_of_any_value(rate: float, seed: int, locales: list[str], augment: bool) -> None:
    config = experiment()
    config.stage.full.peak_lr = rate
    config.seed = seed
    config.data.locales = tuple(locales)
    config.data.augment = augment
    resolved = config_lib.resolve(config)
    assert config_lib.from_json(config_lib.to_json(resolved)) == resolved


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON: "),
        ("[]", "expected a config (ConfigDict) from get_config(), got list"),
        ('{"stage": {}, "seeds": 1}', "seeds: no such field; did you mean seed?"),
    ],
)
def test_json_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        config_lib.from_json(text)


def test_hash_depends_on_values_alone() -> None:
    first = config_lib.resolve(experiment())
    shuffled = dict(reversed(json.loads(config_lib.to_json(first)).items()))
    assert re.fullmatch("[0-9a-f]{12}", config_lib.config_hash(first))
    assert config_lib.config_hash(config_lib.resolve(shuffled)) == config_lib.config_hash(first)
    changed = config_lib.resolve(experiment(), [("stage.full.b1", "0.91")])
    assert config_lib.config_hash(changed) != config_lib.config_hash(first)


def test_hash_is_the_same_in_another_process(config_file: Callable[[str], str]) -> None:
    path = config_file("pass")
    code = f"from neo_jax import config; print(config.config_hash(config.load({path!r})))"
    other = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == config_lib.config_hash(config_lib.load(path))


def test_diff_lists_changed_added_and_removed_fields() -> None:
    old = config_lib.resolve(experiment())
    overrides = [("model.num_layers", "8"), ("data.locales", "en,de"), ("stage.full.mixture", "{'noto': 1}")]
    new = config_lib.resolve(experiment(), overrides)
    assert config_lib.diff(old, new) == [
        "data.locales: ('en',) -> ('en', 'de')",
        "model.num_layers: 6 -> 8",
        "stage.full.mixture.all: 1.0 -> (absent)",
        "stage.full.mixture.noto: (absent) -> 1.0",
    ]
    assert config_lib.diff(old, old) == []


# Sources and ramps


def test_sources_and_ramps_survive_json_and_the_command_line() -> None:
    config = experiment(sources=True)
    config.stage.warm.mixture = ConfigDict({"noto": [[0, 1], [100, 0.5]], "fluent": 1})
    overrides = [
        ("data.sources.noto.path", "gs://bucket/noto"),
        ("data.sources.noto.image_fields", "jpg,png"),
        ("stage.full.mixture", "{'noto': 1, 'fluent': ((0, 0), (50, 2))}"),
        ("stage.warm.mixture.fluent", "((10, 1), (20, 3))"),
    ]
    resolved = config_lib.resolve(config, overrides)
    assert resolved.data.sources.noto.path == "gs://bucket/noto"
    assert resolved.data.sources.noto.image_fields == ("jpg", "png")
    assert resolved.stage.warm.mixture.to_dict() == {
        "noto": ((0.0, 1.0), (100.0, 0.5)),
        "fluent": ((10.0, 1.0), (20.0, 3.0)),
    }
    assert resolved.stage.full.mixture.to_dict() == {"noto": 1.0, "fluent": ((0.0, 0.0), (50.0, 2.0))}
    assert config_lib.from_json(config_lib.to_json(resolved)) == resolved


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage.full.mixture={'notto': 1}", "no source of split 'train'; did you mean noto?"),
        ("stage.full.mixture={'full': 1}", "stage.full.mixture.full: no source of split 'train'"),
        ("stage.full.mixture={'noto': ((0, 1), (9, 0))}", "needs a source with a positive weight at step 9"),
        ("stage.full.mixture={'noto': ((9, 1), (9, 2))}", "do not increase"),
        ("stage.full.mixture={'noto': ((9, -1),)}", "must be at least 0"),
        ("stage.full.mixture={'noto': ((9, 1, 2),)}", "neither a number nor (step, weight) pairs"),
        ("data.sources.noto.kimd=json", "no such field; did you mean data.sources.noto.kind?"),
        ("data.sources.noto.max_rejected=2", "data.sources.noto.max_rejected: must be between 0 and 1"),
        ("data.tokenizer=", "data.tokenizer: data.sources need one"),
    ],
)
def test_mistakes_in_sources_and_ramps(override: str, message: str) -> None:
    assert message in refused(override, sources=True)
