"""Submitting and asking: the commands and what they are given, seen by executables that stand in for them."""

import pytest

from launch import __main__ as command
from neo_jax.errors import UserError
from tests.launch import jobs
from tests.launch.fakes import Commands
from tests.launch.jobs import ROOT

CONFIG = f"--config={ROOT}/configs/neo_9b.py"
SUBMIT = {
    "gke": ["kubectl", "create", "--filename=-"],
    "slurm": ["sbatch", "--parsable"],
    "tpu_vm": ["bash", "-s"],
    "local": ["bash", "-s"],
}
FLAGS = {
    "gke": ["--topology=v6e:4x4", "--image=I"],
    "slurm": ["--topology=h100:16"],
    "tpu_vm": ["--topology=v6e:4x4", "--image=I", "--zone=z", "--mount=gs://b:/workdir"],
    "local": ["--topology=cpu:2"],
}


@pytest.fixture
def commands(tmp_path, monkeypatch):
    found = Commands(tmp_path)
    for name in ("kubectl", "sbatch", "squeue", "sacct", "gcloud", "tail"):
        found.add(name, reads=name in ("kubectl", "sbatch"))
    monkeypatch.setenv("PATH", found.path)
    return found


@pytest.fixture(autouse=True)
def compilers_are_not_asked(monkeypatch):
    """test_launch.py asks them."""
    monkeypatch.setattr("launch.validate.check_flags", lambda group, job: None)


def run(subcommand, backend, *more):
    argv = [subcommand, f"--backend={backend}", CONFIG, "--name=n", *FLAGS[backend], *more]
    command.main(argv)


@pytest.mark.parametrize("backend", ["gke", "slurm"])
def test_the_clusters_command_gets_the_file(backend, commands, capsys):
    run("render", backend)
    text = capsys.readouterr().out
    assert commands.calls == []
    run("submit", backend, "--skip_preflight")
    assert commands.calls == [{"argv": SUBMIT[backend], "stdin": text}]


@pytest.mark.parametrize("backend", SUBMIT)
def test_a_dry_run_changes_nothing(backend, commands, capsys):
    run("submit", backend, "--skip_preflight", "--dry-run")
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == f"# dry run; this would be given to: {' '.join(SUBMIT[backend])}"
    assert commands.calls == []


def test_a_tpu_vm_script_is_run(commands, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # it logs where it is run
    commands.add("gcloud", {"describe": (0, "ACTIVE\n"), "ssh": (0, "neo_jax exit 0\n" * 4)})
    run("submit", "tpu_vm", "--skip_preflight")
    assert [argv[4] for argv in commands.argvs] == ["create", "describe", "ssh", "delete"]
    assert "neo_jax exit 0" in (tmp_path / "n.log").read_text()


def test_this_machine_is_a_cluster_too(commands, tmp_path, monkeypatch):
    """The script starts two processes of the training command, with its flags."""
    commands.add("python")
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    run("submit", "local", "--skip_preflight")
    [argv] = commands.argvs
    assert argv[:2] == ["python", "-c"]
    assert argv[3:5] == [CONFIG, "--workdir=runs/n"] and "--config.mesh.num_devices=2" in argv
    started = []
    monkeypatch.setattr("launch.local.run", lambda command, count: started.append((command, count)))
    monkeypatch.setattr("sys.argv", ["-c", *argv[3:]])
    with pytest.raises(SystemExit):
        exec(argv[2], {})
    assert started == [([str(tmp_path / "python"), "-m", "neo_jax.train", *argv[3:]], 2)]
    with pytest.raises(UserError, match="--backend=local: v6e:2x2 is not this machine"):
        run("render", "local", "--topology=v6e:2x2")
    with pytest.raises(UserError, match="--queue: the local backend has no such thing"):
        run("render", "local", "--queue=q")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mount=gs://b:/dev/shm", "--workdir=/dev/shm/x"], "train mounts 2 volumes at /dev/shm"),
        (["--queue=Bad_Queue!"], "label kueue.x-k8s.io/queue-name is 'Bad_Queue!'"),
        (["--namespace=Bad_NS"], "namespace 'Bad_NS'"),
    ],
)
def test_what_the_api_server_would_refuse_is_not_valid(flags, message):
    with pytest.raises(UserError, match=message) as caught:
        run("validate", "gke", "--skip_preflight", *flags)
    assert "\n" not in str(caught.value)


def test_what_is_wrong_is_not_submitted(commands):
    with pytest.raises(UserError, match="--max_restarts=-1"):
        run("submit", "gke", "--skip_preflight", "--max_restarts=-1")
    assert commands.calls == []


@pytest.mark.parametrize(
    ("backend", "flags", "argvs"),
    [
        (
            "gke",
            ["--namespace=team"],
            [
                ["kubectl", "get", "jobset", "n", "--namespace=team"],
                [
                    *("kubectl", "get", "pods", "--selector=jobset.sigs.k8s.io/jobset-name=n"),
                    "--namespace=team",
                ],
            ],
        ),
        (
            "slurm",
            [],
            [
                ["squeue", "--name=n", "--format=%i %j %T %M %D %R"],
                [
                    *("sacct", "--name=n", "--allocations"),
                    "--format=JobID,JobName,State,ExitCode,Elapsed,NNodes,Restarts",
                ],
            ],
        ),
        ("local", [], [["tail", "-n", "3", "runs/n/metrics.jsonl"]]),
        (
            "tpu_vm",
            ["--zone=z", "--project=p"],
            [["gcloud", "compute", "tpus", "queued-resources", "describe", "n", "--zone=z", "--project=p"]],
        ),
    ],
)
def test_status(backend, flags, argvs, commands):
    command.main(["status", f"--backend={backend}", "--name=n", *flags])
    assert commands.argvs == argvs


def test_what_the_cluster_refuses_is_told(commands, tmp_path, monkeypatch):
    commands.add("sbatch", {"parsable": (3, "")})
    with pytest.raises(UserError, match="sbatch --parsable failed with exit code 3"):
        run("submit", "slurm", "--skip_preflight")
    with pytest.raises(UserError, match="--zone: name the zone"):
        command.main(["status", "--backend=tpu_vm", "--name=n"])
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="squeue is not here: install it, or `render` the file"):
        command.main(["status", "--backend=slurm", "--name=n"])


def test_cases_cover_every_backend():
    assert set(SUBMIT) == set(FLAGS) == {backend for backend, _ in jobs.cases().values()}
