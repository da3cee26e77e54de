"""The scripts for SLURM and TPU VMs, run in bash against executables that stand in for the cluster's."""

import re
import shlex
import subprocess

import pytest

from launch import slurm, tpu_vm, validate
from launch.job import parse_mount, target_of
from neo_jax.errors import UserError
from tests.launch import jobs
from tests.launch.fakes import Commands

CASES = jobs.cases()
SLURM = CASES["slurm_h100_64.sh"][1]
SPOT = CASES["tpu_vm_v6e_4x4_x2_spot.sh"][1]

# Options of sbatch(1) that a script may have.
SBATCH = {
    *("job-name", "nodes", "ntasks-per-node", "gpus-per-node", "exclusive", "mem", "signal", "requeue"),
    *("open-mode", "output", "time", "partition", "qos", "reservation"),
}


@pytest.fixture
def commands(tmp_path):
    return Commands(tmp_path)


def bash(script, commands, **environ):
    environ = {
        "PATH": commands.path,
        "SLURM_JOB_ID": "7",
        "SLURM_SUBMIT_DIR": "/home/me/my runs",
        **environ,
    }
    return subprocess.run(
        ["bash", "-s"], input=script, env=environ, cwd=commands.folder, capture_output=True, text=True
    )


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith(".sh")])
def test_bash_can_parse_it(name):
    validate.check_shell(jobs.render(name))


def test_sbatch_options():
    lines = re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", slurm.render(SLURM), re.MULTILINE)
    options = dict(lines)
    assert len(lines) == len(options) == slurm.render(SLURM).count("#SBATCH")
    assert set(options) <= SBATCH
    assert int(options["nodes"]) * int(options["ntasks-per-node"]) == 64 == SLURM.target.num_devices
    assert options["signal"] == "TERM@300" and options["time"] == "48:00:00"
    assert options["partition"] == "gpu" and options["qos"] == "high" and options["reservation"] == "res-1"


def test_srun_gets_the_command_and_the_environment(commands):
    commands.add("srun")
    done = bash(slurm.render(SLURM), commands)
    assert done.returncode == 0, done.stderr
    [argv] = commands.argvs
    assert argv[:4] == [
        "srun",
        "--kill-on-bad-exit=1",
        "--container-image=registry.example#neo_jax:1",
        "--container-mounts=/home/me/my runs:/workdir,/data/my corpus:/data",
    ]
    assert argv[4:] == SLURM.command()


@pytest.mark.parametrize(
    ("code", "restarts", "again"),
    [
        (0, 0, False),
        (1, 0, False),
        (2, 0, False),
        (4, 0, False),
        (3, 0, True),
        (137, 5, True),
        (137, 20, False),
    ],
)
def test_slurm_queues_again_what_may_pass(code, restarts, again, commands):
    commands.add("srun", {"neo_jax.train": (code, "")})
    commands.add("scontrol")
    done = bash(slurm.render(SLURM), commands, SLURM_RESTART_COUNT=str(restarts))
    assert done.returncode == code
    assert (["scontrol", "requeue", "7"] in commands.argvs) == again


def test_the_environment_is_exported_as_written(commands):
    job = CASES["slurm_h200_8.sh"][1]
    script = slurm.render(job).replace("srun --kill-on-bad-exit=1", "env #")
    done = bash(script, commands, https_proxy="http://proxy")
    exported = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    assert exported["GREETING"] == "it's"
    assert exported["XLA_FLAGS"] == dict(job.environment(8))["XLA_FLAGS"]
    assert "https_proxy" not in exported


def test_commands_of_a_tpu_vm():
    """Argument lists in gcloud's own terms; spot, several nodes and reservations among them."""
    where = ["--zone=us-east5-b"]
    prefix = ["gcloud", "compute", "tpus"]
    assert tpu_vm.create(SPOT) == [
        *(*prefix, "queued-resources", "create", "neo-9b", "--node-count=2", "--node-prefix=neo-9b"),
        *("--accelerator-type=v6e-16", "--runtime-version=v2-alpha-tpuv6e", "--spot", *where),
    ]
    assert tpu_vm.delete(SPOT) == [
        *prefix,
        "queued-resources",
        "delete",
        "neo-9b",
        "--force",
        "--quiet",
        *where,
    ]
    assert [argv[:6] for argv in tpu_vm.run(SPOT)] == [
        [*prefix, "tpu-vm", "ssh", f"neo-9b-{i}"] for i in (0, 1)
    ]
    reserved = tpu_vm.create(CASES["tpu_vm_v5p_4x4x4_reserved.sh"][1])
    assert reserved == [
        *("gcloud", "alpha", "compute", "tpus", "queued-resources", "create"),
        *("neo-9b", "--node-id=neo-9b", "--accelerator-type=v5p-128", "--runtime-version=v2-alpha-tpuv5"),
        *("--reservation=res-1", "--zone=us-east5-a", "--project=lab"),
    ]
    for name in ("tpu_vm_v6e_4x4_x2_spot.sh", "tpu_vm_v5p_4x4x4_reserved.sh"):
        job = CASES[name][1]
        text = tpu_vm.render(job)
        for argv in (tpu_vm.create(job), tpu_vm.describe(job), tpu_vm.delete(job), *tpu_vm.run(job)):
            assert all(isinstance(word, str) for word in argv)
            assert shlex.join(argv) in text and shlex.split(shlex.join(argv)) == argv


def test_the_remote_command_runs_the_container(commands):
    """What ssh is given, run by a shell."""
    for name in ("sudo", "gcsfuse", "mountpoint"):
        commands.add(name)
    [remote] = [
        word.removeprefix("--command=") for word in tpu_vm.run(SPOT)[0] if word.startswith("--command=")
    ]
    done = bash(remote, commands)
    assert done.stdout.splitlines()[-1] == "neo_jax exit 0"
    docker = commands.argvs[-1]
    assert docker == tpu_vm.container(SPOT)
    assert docker[-len(SPOT.command()) :] == SPOT.command()
    assert "--volume=/mnt/neo_jax/0:/workdir" in docker and "--env=NEO_JAX_NUM_PROCESSES=8" in docker


@pytest.mark.parametrize(
    ("source", "folder"),
    [("gs://b", []), ("gs://b/", []), ("gs://b/my_runs/x/", ["--only-dir", "my_runs/x"])],
)
def test_a_bucket_is_mounted_on_the_host(source, folder, commands):
    commands.add("sudo")
    commands.add("gcsfuse")
    commands.add("mountpoint", {"/mnt": (1, "")})
    job = jobs.dataclasses.replace(SPOT, mounts=(parse_mount(f"{source}:/workdir"),))
    bash(tpu_vm.run(job)[0][7].removeprefix("--command="), commands)
    assert [argv[2:] for argv in commands.argvs if argv[:2] == ["sudo", "gcsfuse"]] == [
        ["--implicit-dirs", *folder, "-o", "allow_other", "b", "/mnt/neo_jax/0"]
    ]


@pytest.mark.parametrize(
    ("states", "logs", "code", "attempts"),
    [
        (["WAITING", "ACTIVE"], ["neo_jax exit 0\n" * 4], 0, 1),
        (["ACTIVE"], ["neo_jax exit 1\n" * 4], 1, 1),  # a mistake: not tried again
        (["SUSPENDED", "ACTIVE"], ["neo_jax exit 0\n" * 4], 0, 2),  # spot machines were taken away
        (["ACTIVE"], ["neo_jax exit 3\n" * 4, "neo_jax exit 0\n" * 4], 0, 2),
        (["FAILED"], [""], 1, 3),  # at most two restarts
        (["ACTIVE"], ["docker: manifest unknown\nneo_jax exit 125\n" * 4], 1, 1),  # there is no such image
    ],
)
def test_a_tpu_vm_is_asked_for_again(states, logs, code, attempts, commands):
    job = jobs.dataclasses.replace(SPOT, max_restarts=2)
    commands.add("sleep")
    states = [f"{state}\n" for state in states]
    commands.add(
        "gcloud",
        {"describe": (0, *states), "ssh neo-9b-0": (0, *logs), "ssh neo-9b-1": (0, *logs)},
        reads=True,
    )
    done = bash(tpu_vm.render(job), commands)
    assert done.returncode == code, done.stdout + done.stderr
    assert sum("create" in argv for argv in commands.argvs) == attempts
    assert sum("delete" in argv for argv in commands.argvs) == attempts
    assert tpu_vm.create(job) in commands.argvs and tpu_vm.delete(job) in commands.argvs


def test_a_tpu_vm_that_nobody_knows_is_given_up(commands):
    """Deleted from outside, or the login is over: it is not waited for for ever, and is given back."""
    commands.add("sleep")
    commands.add("gcloud", {"describe": (1, "")})
    done = bash(tpu_vm.render(SPOT), commands)
    assert done.returncode == 1
    assert "gave up: gcloud failed 10 times in a row to tell the state of neo-9b" in done.stderr
    gcloud = [argv for argv in commands.argvs if argv[0] == "gcloud"]
    assert gcloud == [tpu_vm.create(SPOT), *[tpu_vm.describe(SPOT)] * 10, tpu_vm.delete(SPOT)]


def test_a_failed_login_to_the_registry_ends_the_remote_command(commands):
    """It is not what installs gcsfuse, and no container is started without it."""
    commands.add("sudo", {"gcloud auth": (1, "")})
    job = jobs.dataclasses.replace(SPOT, image="us-docker.pkg.dev/p/r/neo_jax:1")
    done = bash(tpu_vm.run(job)[0][7].removeprefix("--command="), commands)
    assert done.returncode == 1 and "neo_jax exit" not in done.stdout
    assert [argv[1:4] for argv in commands.argvs] == [["gcloud", "auth", "configure-docker"]]


@pytest.mark.parametrize(
    ("backend", "changes", "message"),
    [
        (
            slurm,
            {"target": SPOT.target},
            "--backend=slurm: v6e:4x4 x 2 is no GPU; use --backend=gke",
        ),
        (slurm, {"capacity": "spot", "reservation": ""}, "--capacity=spot: SLURM has partitions for that"),
        (slurm, {"image": ""}, "needs --image"),
        (slurm, {"mounts": jobs.CLAIM}, "SLURM mounts folders of its nodes"),
        (slurm, {"workdir": "runs/x"}, "--workdir=runs/x: lies in no mount"),
        (slurm, {"zone": "z"}, "--zone: the slurm backend has no such thing"),
        (tpu_vm, {"target": SLURM.target}, "--backend=tpu_vm: h100:8 x 8 is no TPU"),
        (
            tpu_vm,
            {"target": target_of("tpu7x:2x2x1", 1)},
            "--backend=tpu_vm: there are no TPU VMs of tpu7x:2x2x1; use --backend=gke",
        ),
        (tpu_vm, {"zone": ""}, "--zone: name the zone"),
        (tpu_vm, {"image": ""}, "--image: TPU VMs run a container"),
        (tpu_vm, {"mounts": jobs.CLAIM}, "TPU VMs have no claims"),
        (tpu_vm, {"mounts": ()}, "lies in no mount"),
        (tpu_vm, {"capacity": "flex_start"}, "queued resources have on_demand, spot and reservation"),
        (tpu_vm, {"queue": "q"}, "--queue: the tpu_vm backend has no such thing"),
        (tpu_vm, {"max_restarts": -1}, "--max_restarts=-1: must not be negative"),
    ],
)
def test_a_mistake_is_told_in_one_line(backend, changes, message):
    job = jobs.dataclasses.replace(SLURM if backend is slurm else SPOT, **changes)
    with pytest.raises(UserError, match=re.escape(message)):
        backend.render(job)
