"""Preflight: its parts against counts by hand, and the real train step of a small config for a TPU."""

import json
import math
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict, FrozenConfigDict

from configs import base
from neo_jax import config as config_lib, hardware, mesh as mesh_lib, params as params_lib
from neo_jax.errors import UserError
from neo_jax.hardware import Target
from neo_jax.model.mask import Intervals, dense
from neo_jax.model.transformer import Transformer
from neo_jax.preflight import __main__ as command, estimate, hlo, program, report, search
from neo_jax.preflight.estimate import Rows
from neo_jax.preflight.program import OutOfMemory
from tests.conftest import ROOT
from tests.neo_jax.families import FAMILIES

V5E = Target(hardware.parse("v5e:2x2"))
JSON_KEYS = {
    "fits", "hbm_bytes_per_device", "hbm_limit_bytes", "model_flops_per_device", "hlo_flops_per_device",
    "step_time_estimate_s", "mfu_estimate", "bound_by", "hbm_bytes_by_category",
    "host_memory_bytes_per_device", "xla_cost_flops_per_device", "collectives", "lower_s", "compile_s",
    "compiler_memory_bytes",
}  # fmt: skip


def small_config(**changes) -> FrozenConfigDict:
    """Two layers of NEO's shape in small: heads of 128 channels, rows of 1,024 tokens."""
    c = base.get_config()
    c.model.update(hidden_size=256, num_layers=2, pre_buffer=0, num_heads=2, num_kv_heads=1, head_dim=128)
    c.model.update(mlp_size=512, vocab_size=2048, dtype="bfloat16", remat_policy="full")
    c.stages = ("only",)
    c.stage.only = base.stage(10, batch_size=8, row_tokens=1024, row_patches=512, warmup_steps=1)
    c.update_from_flattened_dict(changes)
    return config_lib.resolve(c)


@pytest.mark.parametrize("mask", ["causal", "image_bidirectional"])
def test_assumed_rows(mask):
    """Intervals of the assumed rows, and the blocks that they reach, against the dense mask."""
    rows = Rows(tokens=96, image_tokens=20, documents=3)
    start, end = rows.intervals(mask)
    allowed = np.zeros((96, 96), bool)
    for i in range(96):
        for j in range(96):
            both_in_image = i % 32 < 20 and j % 32 < 20 and mask != "causal"
            allowed[i, j] = i // 32 == j // 32 and (j <= i or both_in_image)
    found = np.asarray(dense(Intervals(start[None], end[None]), 96))[0]
    np.testing.assert_array_equal(found, allowed)
    live = allowed.reshape(12, 8, 12, 8).any(axis=(1, 3)).sum()
    assert estimate.live_blocks(start, end, 8) == live


def test_refit_keeps_rows_per_device():
    config = small_config()
    fitted = program.refit(config, "only", Target(hardware.parse("v6e:4x4"), num_slices=2))
    assert {axis: fitted.mesh[axis] for axis in ("data", "fsdp", "tensor", "context")} == {
        "data": 2, "fsdp": 16, "tensor": 1, "context": 1,
    }  # fmt: skip
    assert fitted.stage.only.batch_size == 8 * 32
    config = ConfigDict(config.to_dict())
    config.mesh.tensor = 3
    with pytest.raises(UserError, match=r"mesh.tensor \* mesh.context = 3 does not divide the 4 devices"):
        program.refit(FrozenConfigDict(config), "only", V5E)


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,2},{1,3}}, dimensions={0}", (0, 2)),
        ("replica_groups=[2,4]<=[8], x", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", (0, 4)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, x", (0, 4)),
        ("source_target_pairs={{1,3},{3,1}}, x", (1, 3)),
    ],
)
def test_groups(text, group):
    assert hlo._group(text) == group
    shape = {"data": 2, "fsdp": 4} if max(group) > 3 else {"data": 1, "fsdp": 4}
    assert hlo.axes_of(group, shape) == ("data" if group == (0, 4) else "fsdp")


def test_products_with_windows():
    """XLA writes some matrix products as padded convolutions: only places that meet an input count."""
    text = """
%main (a: bf16[64,1,32], b: bf16[32,2,16]) -> bf16[64,2,16] {
  %a = bf16[64,1,32]{2,1,0} parameter(0)
  %b = bf16[32,2,16]{2,1,0} parameter(1)
  ROOT %c = bf16[64,2,16]{2,1,0:T(8,128)(2,1)S(1)} convolution(%a, %b), \
window={size=2 pad=1_1 rhs_reversal=1}, dim_labels=b0f_i0o->b0f, metadata={op_name="x"}
}
""".replace("%main", "ENTRY %main")
    assert hlo.Module(text).flops() == 2 * 64 * 32 * (2 * 16)


@pytest.mark.parametrize(
    ("order", "overlapped"), [("product done", True), ("done product", False), ("product update done", False)]
)
def test_a_gather_by_another_core(order, overlapped):
    """It counts as overlapped if a product runs after its operand is handed over and before it is done."""
    lines = {
        "update": "%u = ((f32[8,4]{1,0}), f32[8,8]{1,0}) async-update(%s, %a)",
        "product": "%p = f32[8,8]{1,0} fusion(%b), kind=kOutput, calls=%fused",
        "done": "%d = f32[8,8]{1,0} async-done(%u)",
    }
    order = order if "update" in order else f"update {order}"
    body = "\n".join(f"  {lines[name]}" for name in order.split())
    text = f"""
%called (x: f32[8,4]) -> f32[8,8] {{
  %x = f32[8,4]{{1,0}} parameter(0)
  ROOT %g = f32[8,8]{{1,0}} all-gather(%x), channel_id=1, replica_groups={{{{0,1}}}}, dimensions={{1}}
}}, execution_thread="sparsecore"

%async (y: f32[8,4]) -> f32[8,8] {{
  %y = f32[8,4]{{1,0}} parameter(0)
  ROOT %c = f32[8,8]{{1,0}} custom-call(%y), custom_call_target="other", called_computations={{%called}}
}}, execution_thread="sparsecore"

%fused (z: f32[8,8]) -> f32[8,8] {{
  %z = f32[8,8]{{1,0}} parameter(0)
  ROOT %m = f32[8,8]{{1,0}} convolution(%z, %z), dim_labels=bf_io->bf
}}

ENTRY %main (a: f32[8,4], b: f32[8,8]) -> f32[8,8] {{
  %a = f32[8,4]{{1,0}} parameter(0)
  %b = f32[8,8]{{1,0}} parameter(1)
  %s = ((), (), (s32[4]{{0:S(2)}})) async-start(), async_execution_thread="sparsecore", calls=%async
{body}
  ROOT %r = f32[8,8]{{1,0}} add(%p, %d)
}}
"""
    (gather,) = hlo.Module(text).collectives()
    assert (gather.opcode, gather.bytes, gather.times) == ("all-gather", 8 * 8 * 4 / 2, 1)
    assert gather.overlapped == overlapped


def test_traffic_of_a_slice_brought_onto_the_chip():
    """Only the slice is read; the chip's own memory, S(1), takes no traffic."""
    text = """
%async (x: s8[64,8]) -> s8[4,8] {
  %x = s8[64,8]{1,0} parameter(0)
  ROOT %part = s8[4,8]{1,0:S(1)} slice(%x), slice={[0:4], [0:8]}
}

ENTRY %main (a: s8[64,8]) -> s8[4,8] {
  %a = s8[64,8]{1,0} parameter(0)
  %start = ((s8[64,8]{1,0}), s8[4,8]{1,0:S(1)}, s32[]{:S(2)}) async-start(%a), calls=%async
  %done = s8[4,8]{1,0:S(1)} async-done(%start)
  ROOT %n = s8[4,8]{1,0} negate(%done)
}
"""
    assert hlo.Module(text).traffic() == 4 * 8 + 4 * 8


def test_step_of_a_small_config(tpu_compiler, capsys):
    """Its memory, its FLOPs against a hand count, and every weight gathered."""
    result = search.check(small_config(), "only", V5E)
    D, N, K, d, F, V, layers = 256, 2, 1, 128, 512, 2048, 2
    tokens, words, patches = 8 * 1024, 8 * 512, 8 * 512  # of a device: 32 rows over four
    layer = D * N * d * 2 + D * K * d * 3 + N * d * D + 3 * D * F
    # Full recomputation, but for the layer's last product, whose result backward does not need.
    products = tokens * layers * (6 * layer + 2 * (layer - F * D))
    products += 6 * D * V * words  # cross-entropy visits supervised positions only
    blocks = estimate.live_blocks(*result.rows.intervals("image_bidirectional"), 512)
    per_pair = 2 * (2 * d + d) * 2 + 2 * (4 * d + 2 * d) + 2 * (4 * d + d)  # forward twice, dkv, dq
    kernels = 8 * layers * N * blocks * 512**2 * per_pair
    found = result.estimate
    assert found.kernel_flops == kernels
    embed = patches * (4 * 768 * 128 * 4 + 512 * D * 6)  # pixels have no gradient
    assert found.hlo_flops - kernels == pytest.approx(products + embed, rel=0.02)
    assert found.mfu == pytest.approx(found.model_flops / (found.step_s * 197e12))

    specs = params_lib.abstract(Transformer(result.config.model))
    kept = {path: math.prod(spec.shape) // (4 if "embed" in spec.axes else 1) for path, spec in specs.items()}
    assert result.state_bytes["parameters"] == 4 * sum(kept.values())
    assert result.fits and sum(result.state_bytes.values()) < result.needed < V5E.hbm_limit
    gathered = sum(size for (_, axes, _), (_, size) in found.transfers.items() if axes == "fsdp")
    assert gathered > 2 * params_lib.count(specs) * 2 * 3 / 4  # bfloat16, forward and backward
    text, told = report.text(result), report.as_json(result)
    assert set(told) == JSON_KEYS
    assert all(value is not None for value in told.values())
    assert f"kernel: {told['xla_cost_flops_per_device']:.3e}" in text and "bound by" in text
    assert 0 < told["xla_cost_flops_per_device"] < found.hlo_flops - kernels  # two layers count as one
    categories = told["hbm_bytes_by_category"]
    assert list(categories) == ["parameters", "optimizer", "batch, scalars", "temporaries"]
    assert categories["batch, scalars"] > 8 * 512 * 3 * 32**2  # bytes of pixels
    for entry in told["collectives"]:
        kinds = [(entry["kind"], entry["axes"], beside) for beside in (False, True)]
        waited, overlapped = (found.transfers.get(kind, (0, 0))[1] for kind in kinds)
        assert (entry["bytes"], entry["overlapped_bytes"]) == (waited + overlapped, overlapped)
    assert sum(entry["bytes"] for entry in told["collectives"] if entry["axes"] == "fsdp") == gathered


def test_layer_inputs_in_the_host_do_not_count(tpu_compiler):
    """Offloading compiles for a TPU, and memory of the host is not added to the device's."""
    layers = 8
    config = small_config(**{"model.remat_policy": "offload", "model.num_layers": layers})
    result = search.check(config, "only", V5E)
    memory = result.program.memory
    assert memory["host"] == layers * 8 * 1024 * 256 * 2  # bfloat16 inputs of eight rows
    assert (
        sum(result.state_bytes.values()) < result.needed < memory["arguments"] + memory["temporaries"] + 2**20
    )


def test_the_state_leaves_the_step_as_it_came(monkeypatch):
    """As train.py asks for: no parameter is split otherwise afterwards, and metrics are everywhere."""
    lowered = []

    def refuse(step, options):
        lowered.append(step)
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Used 20.0G of 15.75G hbm")

    monkeypatch.setattr(program, "schedule", refuse)
    result = search.check(small_config(), "only", V5E)
    assert result.needed == 20 * hardware.GiB
    state, metrics = lowered[0].out_info
    mesh, specs = program.mesh_of(result.config, V5E), params_lib.abstract(Transformer(result.config.model))
    for path, sharding in mesh_lib.param_shardings(mesh, specs).items():
        assert state.params[path].sharding.spec == sharding.spec
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(metrics))


def fake_compile(fits):
    def compile_step(config, stage, mesh):
        if not fits(config):
            return OutOfMemory(20 * hardware.GiB, "RESOURCE_EXHAUSTED: Used 20.0G of 15.75G hbm")
        return program.Program("", {"peak": 10 * hardware.GiB}, 0.0, 0.0, 0.0, 0)

    return compile_step


@pytest.fixture
def faked(monkeypatch):
    """Stands in for the compiler, to reach what follows from its answers."""

    def install(fits):
        monkeypatch.setattr(program, "compile_step", fake_compile(fits))
        monkeypatch.setattr(search.estimate_lib, "estimate", lambda *args: None)

    return install


def test_largest_batch(faked):
    faked(lambda config: config.stage.only.batch_size <= 4 * 13)
    result = search.check(small_config(**{"stage.only.batch_size": 1}), "only", V5E)
    assert search.most_rows(result) == 13


def test_largest_batch_of_a_config_that_accumulates(faked):
    """Its 16 rows per device fit in parts, but only 6 of them at once."""
    faked(lambda config: config.stage.only.batch_size // config.stage.only.accumulate <= 4 * 6)
    result = search.check(
        small_config(**{"stage.only.batch_size": 16, "stage.only.accumulate": 4}), "only", V5E
    )
    assert result.fits and result.rows_per_device == 16
    assert search.most_rows(result) == 6


@pytest.mark.parametrize(
    ("fits", "told"),
    [
        (lambda c: c.model.remat_policy == "full", "would fit with --config.model.remat_policy=full"),
        (
            lambda c: c.stage.only.accumulate == 8,
            "would fit with --config.model.remat_policy=full --config.stage.only.accumulate=8",
        ),
        (lambda c: c.model.remat_policy == "offload", "would fit with --config.model.remat_policy=offload\n"),
        (lambda c: c.stage.only.row_tokens == 512, "row_tokens=512 --config.stage.only.row_patches=256"),
        (lambda c: False, "use more devices"),
    ],
)
def test_what_does_not_fit_says_what_would(faked, fits, told, tmp_path, capsys):
    faked(fits)
    file = tmp_path / "config.py"
    config = json.dumps(small_config(**{"model.remat_policy": "none"}).to_dict())
    file.write_text(f"import json\ndef get_config():\n    return json.loads({config!r})\n")
    written = tmp_path / "found.json"
    code = command.main([f"--config={file}", "--topology=v5e:2x2", "--json", f"--out={written}"])
    out = capsys.readouterr().out
    assert code == command.EXIT_DOES_NOT_FIT
    assert told in out
    last = json.loads(out.splitlines()[-1])
    assert last["fits"] is False and last["hbm_bytes_per_device"] == 20 * hardware.GiB
    assert set(last) == JSON_KEYS and set(last["hbm_bytes_by_category"]) == {"parameters", "optimizer"}
    assert json.loads(written.read_text()) == last


@pytest.mark.parametrize(
    ("tensor", "advised"),
    [
        (2, "use more devices, or split heads and inner widths further with mesh.tensor"),
        (4, "use more devices"),
    ],
)
def test_tensor_is_advised_only_while_devices_are_left_for_it(faked, tensor, advised):
    faked(lambda config: False)
    heads = {"model.num_heads": 4, "model.num_kv_heads": 4}
    config = small_config(**heads, **{"mesh.num_devices": 4, "mesh.tensor": tensor, "mesh.fsdp": 4 // tensor})
    assert search.suggestion(search.check(config, "only", V5E)) == advised


@pytest.mark.parametrize(
    ("stage", "changes", "expected"),
    [
        # An image of 2048 x 2048 pixels needs 4,096 tokens, and then a caption: half a row is too short.
        ("sft", {}, ["offload"]),
        # An odd number of rows per device.
        ("sft", {"batch_size": 3 * 128}, ["offload", "accumulate=3", "offload accumulate=3"]),
        (
            "pretrain",
            {"accumulate": 1},
            [
                "offload",
                "accumulate=2",
                "offload accumulate=2",
                "offload accumulate=2 row_tokens=4096 row_patches=3072",
                "offload accumulate=2 row_tokens=2048 row_patches=1536",
            ],
        ),
        # An image of 1472 x 1472 pixels fits into half a row, but not into half of its patches.
        (
            "midtrain",
            {"row_patches": 3072, "max_pixels": 1472**2},
            ["offload", "offload row_tokens=4096 row_patches=2116"],
        ),
    ],
)
def test_what_is_suggested_for_a_shipped_config_loads(stage, changes, expected, faked):
    faked(lambda config: False)
    source, target = str(ROOT / "configs" / "neo_2b.py"), Target(hardware.parse("v5e:4x4"))
    given = [(f"stage.{stage}.{name}", str(value)) for name, value in changes.items()]
    suggested = list(search._changes(search.check(config_lib.load(source, given), stage, target)))
    for overrides, config in suggested:
        loaded = config_lib.load(source, given + overrides)
        assert program.refit(loaded, stage, target) == config
    told = [" ".join(f"{field}={value}" for field, value in overrides) for overrides, _ in suggested]
    assert [
        text.replace("model.remat_policy=", "").replace(f"stage.{stage}.", "") for text in told
    ] == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--topology=v5e:2x9"],
            "v5e:2x9: hosts have 2x2 chips, so the first two sizes must be even, such as",
        ),
        (["--topology=v5p:3x4x4"], "topology v5p:3x4x4: hosts have 2x2 chips, .* such as v5p:4x4x4$"),
        (["--topology=v7:2x2"], "unknown generation 'v7'"),
        (["--topology=h100:8"], "only TPU programs"),
        (["--topology=v5e:2x2", "--stage=third"], "--stage=third: the config has"),
        (["--topology=v5e:2x2", "--num_slices=0"], "--num_slices: must be positive"),
        (["--topology=v5e:2x2", "--out=/"], "--out=/: name a file, in a folder that exists"),
        (["--all", "--out=no/such/found.json"], "--out=no/such/found.json: name a file"),
    ],
)
def test_bad_input_is_one_line(flags, message):
    with pytest.raises(UserError, match=message):
        command.main([f"--config={ROOT}/configs/neo_2b.py", *flags])


def test_the_compiler_starts_in_silence():
    """A mistake is the only line on stderr: libtpu does not miss the machine that is not there."""
    start = "from neo_jax.preflight import __main__, program; from neo_jax.hardware import parse; "
    start += "program.topologies.get_topology_desc(platform='tpu', topology_name=parse('v5e:2x2').topology)"
    left_out = ("TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES", "XLA_FLAGS")
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    run = subprocess.run(
        [sys.executable, "-c", start], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert (run.returncode, run.stderr) == (0, "")


def test_out_of_memory_is_read_from_the_compiler():
    text = "HLO temporaries (384.00G) exceeds available HBM (15.75G)"
    assert program._needed(text) == 384 * hardware.GiB
    assert program._needed("Used 19.8G of 15.75G hbm. Exceeded by 4G") == pytest.approx(19.8 * hardware.GiB)


def test_all_covers_every_family():
    assert {path for path, _, _ in command.SHIPPED} == {f"configs/{name}.py" for name in FAMILIES}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "topology"), [("neo_2b", "v5e:4x4"), ("neo_9b", "v5p:4x4x4")])
def test_shipped_configs(name, topology, tpu_compiler):
    """The full sizes at 8k tokens per device: minutes each."""
    config = config_lib.load(str(ROOT / "configs" / f"{name}.py"))
    result = search.check(config, config.stages[-1], Target(hardware.parse(topology)))
    found = result.estimate
    assert result.fits
    assert result.rows_per_device * result.config.stage[result.stage].row_tokens >= 8192
    assert found.hlo_flops <= 1.36 * found.model_flops
    assert found.mfu >= 0.55
    gathered = [
        (beside, size) for (kind, _, beside), (_, size) in found.transfers.items() if kind == "all-gather"
    ]
    assert sum(size for beside, size in gathered if beside) >= 0.9 * sum(size for _, size in gathered)
    assert result.program.host_bytes < 16 * hardware.GiB
