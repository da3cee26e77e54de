"""What all tests share: JAX on four simulated CPU devices, the golden files, the quickstart data."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# Before jax is imported; commands that tests start inherit it. Tests compile the same small programs again
# and again, in many processes: the cache lets each be compiled once.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parent.parent / ".pytest_cache" / "jax")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# They compile far more than they compute: no optimisations, and loops as XLA emitted them before it had
# emitters of fusions, which takes a third of the time.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"
# The TPU compiler in libtpu is used without a TPU, and by several processes when tests run beside each other.
os.environ["TPU_SKIP_MDS_QUERY"] = os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
# Or gRPC, which Beam starts threads of, can abort a process that forks later, as torch's loader does.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

import filelock
import hypothesis
import jax
import pytest
from ml_collections import FrozenConfigDict

from tests import golden_files

ROOT = Path(__file__).parent.parent
# Test files that take longest. They are dealt first, as a long one dealt last would keep one process waiting.
LONGEST = ("test_train.py", "test_faults.py", "test_processes.py", "test_step.py", "test_preflight.py")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than a few seconds; left out of `make test`")
    config.addinivalue_line(
        "markers", "golden: compares with tests/golden; set on every test that uses golden_dir"
    )
    # A slow machine is no failure.
    hypothesis.settings.register_profile("neo_jax", deadline=None)
    hypothesis.settings.load_profile("neo_jax")
    # Set here and not in the environment, so that commands started by tests see one device, as users do.
    jax.config.update("jax_num_cpu_devices", 4)
    # [D] + [B, D] by accident is the commonest silent shape bug; broadcasting must be written out.
    jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    for item in items:
        if "golden_dir" in getattr(item, "fixturenames", ()):
            item.add_marker("golden")


@pytest.fixture(scope="module", autouse=True)
def forget_programs() -> Iterator[None]:
    """Compiled programs of one test file are of no use to the next; kept, they add up to gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture
def tpu_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Programs for TPUs are compiled as for use: what XLA's optimisations make of them is looked at."""
    jax.jit(lambda: 0)()  # from here on this process's own XLA has read its flags
    monkeypatch.delenv("XLA_FLAGS")  # libtpu ends a process over a flag that it does not know
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session")
def golden_dir() -> Callable[[str], Path]:
    """Function from a model family ("neo", ...) to the folder of its recorded truths.

    NEO_GOLDEN_DIR points to another set of the same layout. A missing family fails the test, as a skip would
    hide it.
    """

    def family_dir(family: str) -> Path:
        folder = golden_files.ROOT / family
        if not folder.is_dir():
            pytest.fail(f"no golden files in {folder}")
        return folder

    return family_dir


@pytest.fixture(scope="session")
def shared_tmp(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder that all worker processes of this test run share; what is made in it is made under a lock."""
    base = tmp_path_factory.getbasetemp()
    return base if worker_id == "master" else base.parent


@pytest.fixture(scope="session")
def quickstart_data(shared_tmp: Path) -> FrozenConfigDict:
    """The quickstart config, its data built under the repository once and reused by later runs."""
    from data_pipelines import build
    from neo_jax import config

    path = ROOT / "data" / "quickstart"
    resolved = config.load(str(ROOT / "configs" / "quickstart.py"), [("data.path", str(path))])
    with filelock.FileLock(shared_tmp / "quickstart.lock"):
        build.ensure(resolved.data)
    return resolved


@pytest.fixture(scope="session")
def smoke_workdir(quickstart_data: FrozenConfigDict, shared_tmp: Path) -> Path:
    """A workdir in which `configs/quickstart.py:smoke` has been trained to its end, by its command."""
    workdir, done = shared_tmp / "smoke" / "run", shared_tmp / "smoke" / "done"
    config = str(ROOT / "configs" / "quickstart.py") + ":smoke"
    command = [sys.executable, "-m", "neo_jax.train", f"--config={config}", f"--workdir={workdir}"]
    command.append(f"--config.data.path={quickstart_data.data.path}")
    with filelock.FileLock(shared_tmp / "smoke.lock"):
        if not done.exists():
            subprocess.run(command, check=True, cwd=ROOT, stdin=subprocess.DEVNULL)
            done.touch()
    return workdir
