"""The command: golden files, pods that validate, flags that compilers know, mistakes in one line."""

import json
import re
import shlex
import subprocess
import sys

import pytest

from launch import __main__ as command, fit, flags, validate
from launch.backends import BACKENDS
from launch.job import FATAL_EXIT_CODES, target_of
from neo_jax import config as config_lib, errors, hardware, workdir
from neo_jax.errors import UserError
from tests.launch import jobs
from tests.launch.jobs import GOLDEN, ROOT

CONFIG = f"--config={ROOT}/configs/neo_9b.py"


@pytest.mark.parametrize("name", jobs.cases())
def test_files_are_as_reviewed(name):
    assert jobs.render(name) == (GOLDEN / name).read_text()


def test_every_backend_and_every_golden_file_has_a_case():
    assert {file.name for file in GOLDEN.iterdir()} == set(jobs.cases())
    assert {backend for backend, _ in jobs.cases().values()} == set(BACKENDS)


@pytest.mark.parametrize("topology", ["v5p:4x4x4 --num_slices=2", "v6e:16x16", "tpu7x:4x4x8", "h100:64"])
def test_pods_validate(topology, capsys):
    argv = ["validate", "--backend=gke", f"--topology={topology}", CONFIG, "--image=I", "--name=N".lower()]
    command.main([*" ".join(argv).split(), "--skip_preflight"])
    out = capsys.readouterr().out
    assert "manifest: has the fields of JobSet v1alpha2" in out
    assert "flags: jaxlib knows the 3" in out if "h100" in topology else "flags: libtpu knows the" in out
    assert out.endswith("n: valid\n")


README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^\.venv/bin/python -m launch ((?:render|validate|submit) .*)$", README, re.MULTILINE)


@pytest.mark.parametrize("line", COMMANDS)
def test_the_commands_of_the_readme_run(line, monkeypatch, capsys):
    assert line.startswith("submit") == line.endswith("--dry-run")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(validate, "check_flags", lambda group, job: None)  # asked for below
    skip = [] if line.startswith("render") else ["--skip_preflight"]
    command.main([*shlex.split(line), *skip])
    assert "neo-9b" in capsys.readouterr().out


def test_the_readme_shows_every_subcommand():
    assert {line.split()[0] for line in COMMANDS} == {"render", "validate", "submit"}


@pytest.mark.slow
def test_preflight_is_part_of_validation(capsys):
    """A toy model on two small slices, compiled with the group's own flags."""
    argv = ["validate", "--backend=gke", f"--config={ROOT}/configs/neo_2b.py:tiny", "--image=I", "--name=n"]
    command.main([*argv, "--topology=v6e:2x2", "--num_slices=2", "--flags=sparse_core"])
    assert "preflight: fits, 0.0 of 31.2 GiB per device" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("code", "out", "err", "told"),
    [
        (5, "a table\ndoes not fit; use more devices\n{}\n", "", "does not fit; use more devices"),
        (1, "", "some log\nerror: topology v5p:4x4x4: nonsense\n", "topology v5p:4x4x4: nonsense"),
        (-9, "", "", "exit code -9"),
    ],
)
def test_what_preflight_finds_is_told(code, out, err, told, monkeypatch):
    commands = []

    def run(command, env):
        commands.append((command, env))
        return subprocess.CompletedProcess(command, code, out, err)

    monkeypatch.setattr(validate, "_run", run)
    job = jobs.job("v5p:4x4x4", 2)
    with pytest.raises(
        UserError, match=re.escape(f"preflight of configs/neo_9b.py on v5p:4x4x4 x 2: {told}")
    ):
        validate.check_preflight(job, flags.group("default", job.target))
    [(command, env)] = commands
    assert command[1:6] == [
        *("-m", "neo_jax.preflight", "--config=configs/neo_9b.py", "--topology=v5p:4x4x4", "--num_slices=2"),
    ]
    assert "--config.mesh.num_slices=2" in command
    assert "megascale_graph_hang_threshold" in env["LIBTPU_INIT_ARGS"]


def test_compilers_refuse_flags_they_do_not_know():
    for topology, variable in (("v5e:2x2", "LIBTPU_INIT_ARGS"), ("h100:8", "XLA_FLAGS")):
        job = jobs.job(topology, env=((variable, "--xla_no_such_flag=true"),))
        with pytest.raises(UserError, match=r"--flags=default: .* says: .*xla_no_such_flag"):
            validate.check_flags(flags.group("default", job.target), job)


def test_groups_follow_generation_and_slices():
    one, two = (flags.group("default", target_of("v5p:4x4x4", n)).flags for n in (1, 2))
    assert set(one) < set(two) and all(
        "megascale" in name or "xla_tpu" in name for name in set(two) - set(one)
    )
    assert "xla_tpu_scoped_vmem_limit_kib" in one
    none = flags.group("none", target_of("v5p:4x4x4", 2))
    assert none.environment == {"NEO_JAX_FLAGS": "none"}
    assert "CUDA_DEVICE_MAX_CONNECTIONS" in flags.group("default", target_of("h200:8", 1)).environment
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in flags.group("default", target_of("b200:8", 1)).environment


def test_a_run_records_its_flags(tmp_path, monkeypatch):
    """The group and its flags, of the first start and of a restart with others, on other machines."""
    spec = str(ROOT / "configs" / "neo_2b.py")

    def start(topology, group_name):
        target = target_of(topology, 1)
        for name in ("XLA_FLAGS", "JAX_OPTIMIZATION_LEVEL"):
            monkeypatch.delenv(name, raising=False)
        group = flags.group(group_name, target)
        monkeypatch.setenv("LIBTPU_INIT_ARGS", group.text)
        monkeypatch.setenv(flags.GROUP_VARIABLE, group.name)
        workdir.claim(tmp_path, config_lib.load(spec, fit.fields(spec, (), target)))
        return {"NEO_JAX_FLAGS": group_name, "LIBTPU_INIT_ARGS": group.text}

    expected = [start("v5p:4x4x4", "default")]
    start("v5p:4x4x4", "default")
    expected.append(start("v5e:4x4", "sdc"))
    assert json.loads((tmp_path / "config.json").read_text())["flags"] == expected


def test_a_script_that_bash_cannot_parse_is_told():
    validate.check_shell("echo 'a b'\n")
    with pytest.raises(UserError, match=r"script: .*unexpected EOF"):
        validate.check_shell("echo 'a b\n")


@pytest.mark.parametrize(
    ("topology", "num_slices", "mesh", "pretrain", "sft"),
    [
        ("v5p:4x4x8", 1, (128, 1, 1, 128), (256, 2), (128, 1)),  # the config's own size
        ("v5p:4x4x4", 2, (128, 2, 2, 64), (256, 2), (128, 1)),
        ("v6e:16x16", 1, (256, 1, 1, 256), (256, 1), (256, 1)),
        ("h100:64", 1, (64, 8, 8, 8), (256, 4), (128, 2)),
        ("v5e:4x4", 1, (16, 1, 1, 16), (256, 16), (128, 8)),
    ],
)
def test_the_mesh_is_fitted_to_the_machines(topology, num_slices, mesh, pretrain, sft):
    spec = str(ROOT / "configs" / "neo_9b.py")
    fields = fit.fields(spec, (), target_of(topology, num_slices))
    config = config_lib.load(spec, fields)
    assert tuple(config.mesh[name] for name in ("num_devices", "num_slices", "data", "fsdp")) == mesh
    for name, expected in (("pretrain", pretrain), ("sft", sft)):
        assert (config.stage[name].batch_size, config.stage[name].accumulate) == expected


def test_codes_that_end_a_job_are_those_of_mistakes():
    assert set(FATAL_EXIT_CODES) == {errors.EXIT_USER_ERROR, errors.EXIT_USAGE, errors.EXIT_NONFINITE}
    assert not {errors.EXIT_INTERRUPTED, errors.EXIT_HANG, errors.EXIT_FAULT} & set(FATAL_EXIT_CODES)


GKE = ["--backend=gke", "--topology=v5p:4x4x4", "--image=I", "--name=n"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([*GKE, "--topology=v9:4x4"], "unknown generation 'v9'; choose from v5e, v5p"),
        ([*GKE, "--topology=v5p:4x4"], "v5p has 3-D shapes, such as v5p:4x4x4"),
        ([*GKE, "--topology=v5p:3x4x4"], "topology v5p:3x4x4: not offered; 3-D slices are"),
        ([*GKE, "--topology=v5p:16x16x32"], "not offered; .* up to 6144 chips"),
        ([*GKE, "--topology=v6e:4x16"], "topology v6e:4x16: not offered; 2-D slices are 1x1, 2x2"),
        ([*GKE, "--topology=h100:12"], "topology h100:12: not offered; hosts have 8 GPUs"),
        ([*GKE, "--topology=cpu:2"], "--backend=gke: cpu:2 is no accelerator; use --backend=local"),
        ([*GKE, "--topology=cpu:65"], "processes of one machine are at most 64"),
        ([*GKE, "--num_slices=0"], "--num_slices=0: must be at least 1"),
        (
            [*GKE, "--config.mesh.tensor=3"],
            r"mesh.tensor \* mesh.context = 3 does not divide the 64 devices",
        ),
        ([*GKE, "--config.mesh.fsdp=64"], "mesh.num_devices: 128 is not the product of"),
        (
            [*GKE, "--config.mesh.fsdp=32", "--config.mesh.num_devices=32"],
            "32 devices in 1 .* but v5p:4x4x4 has 64 in 1; change it, or leave mesh.num_devices",
        ),
        ([*GKE, "--config.mesh.tensor=a"], "--config.mesh.tensor=a: must be a positive whole"),
        ([*GKE, "--config.modl.x=1"], "--config.modl"),
        ([*GKE, "--name=Neo_9B"], "--name=Neo_9B: must be 1 to 63 lower-case letters"),
        (
            [*GKE, f"--name={'n' * 60}"],
            "60 characters; at most 46, so that the names of 16 pods stay within 63",
        ),
        (
            [*GKE, "--pathways=gs://b", f"--name={'n' * 23}"],
            "23 characters; at most 22, so that the label with the address of Pathways' head stays within 63",
        ),
        ([*GKE, "--image="], "--image: GKE runs containers"),
        ([*GKE, "--capacity=flex_start"], "--capacity=flex_start: needs --queue=NAME"),
        ([*GKE, "--capacity=flex_start", "--queue=q", "--hours=200"], "for 168 hours at most"),
        (
            [*GKE, "--capacity=cheap"],
            "--capacity=cheap: choose from on_demand, spot, reservation, flex_start",
        ),
        ([*GKE, "--capacity=reservation"], "--capacity=reservation and --reservation=NAME go together"),
        ([*GKE, "--max_restarts=-1"], "--max_restarts=-1: must not be negative"),
        ([*GKE, "--hours=-1"], "--hours=-1: must not be negative"),
        ([*GKE, "--hours=5"], "--hours: GKE limits the time of --capacity=flex_start only"),
        ([*GKE, "--grace_s=1"], "--grace_s=1: must be at least 30"),
        ([*GKE, "--workdir=/tmp/x"], "--workdir=/tmp/x: lies in no mount"),
        ([*GKE, "--mount=bucket"], "--mount=bucket: write gs://BUCKET:/PATH"),
        ([*GKE, "--mount=s3://b:/workdir"], "--mount=s3://b:/workdir: write gs://BUCKET:/PATH"),
        ([*GKE, "--mount=a/b:/workdir"], "'a/b' is no absolute path"),
        ([*GKE, "--mount=gs:///b:/workdir"], "--mount=gs:///b:/workdir: write gs://BUCKET:/PATH"),
        ([*GKE, "--mount=gs://b/a,b:/workdir"], "only without spaces, commas and colons"),
        ([*GKE, "--mount=pvc://c/d:/workdir"], "a claim is mounted as a whole"),
        ([*GKE, "--mount=gs://a:/workdir", "--mount=gs://b:/workdir"], "two mounts have the same path"),
        ([*GKE, "--env=A"], "--env=A: write --env=NAME=VALUE"),
        ([*GKE, "--env=a-b=1"], "--env=a-b: not a name of an environment variable"),
        ([*GKE, "--flags=fast"], "--flags=fast: no such group; choose from default"),
        ([*GKE, "--flags=sparse_core"], "--flags=sparse_core: is for v6e and tpu7x"),
        ([*GKE, "--topology=h100:8", "--flags=sdc"], "--flags=sdc: is for TPUs"),
        ([*GKE, "--pathways=/tmp"], "--pathways=/tmp: must be a folder in Cloud Storage"),
        ([*GKE, "--pathways=gs://b", "--topology=h100:8"], "--pathways: is for TPUs"),
        ([*GKE, "--pathways=gs://b", "--ramdisk=/r"], "--ramdisk: has no use with --pathways"),
        ([*GKE, "--ramdisk=r"], "--ramdisk=r: must be an absolute path"),
        ([*GKE, "--ramdisk=/r", "--topology=h100:8"], "--ramdisk: GKE has it for TPUs"),
        ([*GKE, "--ramdisk=/r"], "--ramdisk: the first slice keeps no checkpoints in memory"),
        ([*GKE, "--zone=here"], "--zone: the gke backend has no such thing"),
        ([*GKE, "--topology=h100:8", "--placement_policy=p"], "--placement_policy: is for TPU node pools"),
    ],
)
def test_a_mistake_is_told_in_one_line(argv, message):
    with pytest.raises(UserError, match=message) as caught:
        command.main(["render", CONFIG, *argv])
    assert "\n" not in str(caught.value)


def test_the_command_ends_as_all_commands_do():
    """A mistake is one line on stderr and exit code 1; the file is what stdout gets."""
    argv = [sys.executable, "-m", "launch", "render", CONFIG, *GKE]
    run = subprocess.run([*argv, "--capacity=spot"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.startswith(
        "# n on v5p:4x4x4: 1 node pool(s) of 16 x ct5p-hightpu-4t"
    )
    assert run.stderr.startswith("fitted to the 64 devices of v5p:4x4x4: --config.mesh.num_devices=64")
    failed = subprocess.run([*argv, "--max_restarts=-2"], cwd=ROOT, capture_output=True, text=True)
    assert failed.returncode == 1 and failed.stdout == ""
    assert failed.stderr.splitlines()[-1] == "error: --max_restarts=-2: must not be negative"


@pytest.mark.parametrize(
    ("topology", "hosts", "vm_type", "machine"),
    [  # Cloud TPU's documentation: v5p and tpu7x are named after cores, v5e and v6e after chips
        ("v5e:4x4", 4, "v5litepod-16", "ct5lp-hightpu-4t"),
        ("v5p:4x4x4", 16, "v5p-128", "ct5p-hightpu-4t"),
        ("v6e:16x16", 64, "v6e-256", "ct6e-standard-4t"),
        ("v6e:1x1", 1, "v6e-1", "ct6e-standard-1t"),
        ("tpu7x:4x4x8", 32, "tpu7x-256", "tpu7x-standard-4t"),
    ],
)
def test_names_of_slices(topology, hosts, vm_type, machine):
    found = hardware.parse(topology)
    hardware.check_offered(found)
    assert (found.num_hosts, found.vm_type, found.machine) == (hosts, vm_type, machine)
