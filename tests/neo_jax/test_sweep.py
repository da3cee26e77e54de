"""Sweeps: how changes combine, what the grids hold constant, and cells run, resumed and reported."""

import dataclasses
import json
import math
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet
import pytest

from configs import quickstart
from neo_jax import config as config_lib, grow, objectives, optim, params, workdir as workdir_lib
from neo_jax.errors import EXIT_INTERRUPTED, EXIT_NONFINITE, EXIT_OK, UserError
from neo_jax.scaling import points
from neo_jax.sweep import __main__ as command, cells, grids, local, table
from neo_jax.sweep.cells import Cell, Change

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "configs/sweeps").glob("*.py"))
WIDTH, RATE = "model.mlp_size", "stage.full.peak_lr"


def base():
    """A tiny model with one stage."""
    c = quickstart.get_config("tiny")
    c.stages = ("full",)
    c.stage = type(c.stage)({"full": c.stage.full})
    c.stage.full.warmup_steps = 2
    c.stage.full.steps = 20
    c.eval.splits = ("dev",)
    return c


# Cells


def test_product_chain_and_zip():
    widths, rates = cells.axis(WIDTH, (128, 256), "w"), cells.axis(RATE, (1e-3, 3e-3), "lr")
    names = [change.name for change in cells.product(widths, rates)]
    assert names == ["w128-lr0.001", "w128-lr0.003", "w256-lr0.001", "w256-lr0.003"]
    zipped = cells.zip_(widths, rates)
    assert [dict(change.values) for change in zipped] == [{WIDTH: 128, RATE: 1e-3}, {WIDTH: 256, RATE: 3e-3}]
    assert [change.name for change in cells.chain(widths, rates)] == ["w128", "w256", "lr0.001", "lr0.003"]
    built = cells.build(base(), zipped)
    assert [(cell.config.model.mlp_size, cell.config.stage.full.peak_lr) for cell in built] == [
        (128, 1e-3),
        (256, 3e-3),
    ]
    assert len({config_lib.config_hash(cell.config) for cell in built}) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cells.zip_(cells.axis(WIDTH, (1, 2)), cells.axis(RATE, (1e-3,))), "different lengths: 2, 1"),
        (lambda: cells.product(cells.axis(WIDTH, (1,)), cells.axis(WIDTH, (2,))), "both set model.mlp_size"),
        (
            lambda: cells.build(base(), cells.axis("model.mlp", ("relu3",))),
            "cell mlprelu3: model.mlp: 'relu3'",
        ),
        (lambda: cells.build(base(), cells.axis("model.width", (3,))), "model.width: no such field"),
        (lambda: cells.check([]), "no cell"),
        (lambda: cells.check("w128"), "must return a list of cells"),
        (lambda: cells.check(cells.build(base(), cells.axis(WIDTH, (8, 8)))), "two cells are named"),
        (lambda: cells.check([Cell("a", base(), trunk="b")]), "trunk 'b' is no earlier cell"),
        (lambda: cells.find(cells.build(base(), cells.axis(WIDTH, (8,))), "x"), "no cell 'x'"),
    ],
)
def test_mistakes_in_a_sweep_are_told(make, message):
    with pytest.raises(UserError) as caught:
        make()
    assert message in str(caught.value)


# Grids


def sizes():
    return [
        grids.size("s", width=32, layers=2, heads=2, pre_buffer=1, peak_lr=4e-3),
        grids.size("m", width=64, layers=2, heads=2, pre_buffer=1, peak_lr=2e-3),
    ]


def test_isoflop_spends_the_same_everywhere():
    budgets = (2e10, 4e10)
    made = grids.isoflop(base(), sizes(), budgets, document_tokens=20)
    assert [cell.name for cell in made] == ["s-C2e10", "s-C4e10", "m-C2e10", "m-C4e10"]
    for cell in made:
        spent = cell.config.stage.full.steps * grids.step_flops(cell.config, 20)
        assert spent == pytest.approx(cell.budget, rel=0.05)
    assert {cell.config.stage.full.peak_lr for cell in made} == {4e-3, 2e-3}


def test_under_wsd_shorter_runs_branch_from_the_longest():
    config = base()
    config.stage.full.schedule = "wsd"
    made = cells.check(grids.cooldowns(config, sizes(), (20, 80, 40)))
    assert [(cell.name, cell.trunk) for cell in made[:3]] == [
        ("s-D80", ""),
        ("s-D20", "s-D80"),
        ("s-D40", "s-D80"),
    ]
    trunk, *branches = made[:3]
    assert trunk.config.train.keep_steps == (16, 32)
    rate = optim.wsd(trunk.config.stage.full)
    for branch in branches:
        stage = branch.config.stage.full
        assert branch.branch_step == 0.8 * stage.steps
        assert (
            float(optim.wsd(stage)(branch.branch_step))
            == float(rate(branch.branch_step))
            == pytest.approx(4e-3)
        )
        assert float(optim.wsd(stage)(stage.steps - 1)) < 4e-3
    with pytest.raises(UserError, match='must be "wsd"'):
        grids.cooldowns(base(), sizes(), (20,))


def test_lr_batch_keeps_the_tokens():
    made = grids.lr_batch(base(), (1e-3, 2e-3), (2, 4, 8))
    assert len({cell.name for cell in made}) == 6
    assert {cell.config.stage.full.batch_size * cell.config.stage.full.steps for cell in made} == {80}


def test_resolutions_in_mixtures():
    mixes = {"noto": {"noto": 1}, "half": {"noto": 1, "fluent": 1}}
    made = grids.resolutions(base(), (32, 64), mixes)
    assert [cell.name for cell in made] == ["noto-px32", "noto-px64", "half-px32", "half-px64"]
    assert [cell.arm for cell in made] == [cell.name for cell in made]
    assert made[3].config.stage.full.max_pixels == made[3].config.stage.full.min_pixels == 64 * 64
    assert dict(made[3].config.stage.full.mixture) == {"noto": 1.0, "fluent": 1.0}


def test_arms_of_mixtures_experts_and_frozen_models(tmp_path):
    mixed = grids.mixtures(base(), {"half": {"noto": 1, "fluent": 1}, "noto": {"noto": 1}}, sizes())
    assert [cell.name for cell in mixed] == ["half-s", "half-m", "noto-s", "noto-m"]
    assert [cell.arm for cell in mixed] == ["half", "half", "noto", "noto"]
    assert dict(mixed[0].config.stage.full.mixture) == {"noto": 1.0, "fluent": 1.0}
    arms = grids.experts_and_dense(base())
    dense, mlp, everything, learned = (table.sizes(cell.config) for cell in arms)
    assert dense["n_active"] == mlp["n_active"] == everything["n_active"] == dense["n_non_embedding"]
    assert dense["n_total"] < mlp["n_total"] < everything["n_total"]
    model, objectives = arms[-1].config.model, arms[-1].config.stage.full.objectives
    assert learned["n_active"] - dense["n_active"] == model.num_layers * model.hidden_size * 8  # the routers
    mlps = model.num_layers * 3 * model.hidden_size * model.mlp_size
    assert learned["n_total"] - learned["n_active"] == 7 * mlps + dense["n_total"] - dense["n_active"]
    assert objectives.to_dict() == {"ntp": 1.0, "balance": 0.01}
    config = base()
    config.init = str(tmp_path)
    native, modular = grids.native_and_modular(config)
    assert native.config.stage.full.trainable == (".*",)
    assert modular.config.stage.full.trainable == ("patch_embed/.*", "pre_buffer/.*")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: grids.isoflop(base(), sizes(), (-1e10,), document_tokens=20),
            "positive numbers of FLOPs, got -1e+10",
        ),
        (
            lambda: grids.isoflop(base(), sizes(), (1e8,), document_tokens=20),
            "not more than the warm-up of 2",
        ),
        (lambda: grids.size("s", width=30, layers=2, heads=4, peak_lr=1e-3), "30 is not divisible by 2 * 4"),
        (lambda: grids.native_and_modular(base()), "config.init must name"),
        (
            lambda: grids.resolutions(base(), (256,), {"noto": {"noto": 1}}),
            "is less than the 256 tokens of one image",
        ),
    ],
)
def test_grids_that_make_no_sense_are_refused(make, message):
    with pytest.raises(UserError) as caught:
        make()
    assert message in str(caught.value)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_sweep_file_expands_as_its_header_says(file, capsys):
    config, workdir = f"--config={file.relative_to(ROOT)}", f"--workdir=runs/sweeps/{file.stem}"
    assert f"\npython -m neo_jax.sweep run {config} {workdir}\n" in file.read_text()
    assert command.main(["expand", f"--config={file}", workdir]) == EXIT_OK
    *_, last = cells.load(file)
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"{last.name}: ")
    assert config_lib.load(f"{file}:{last.name}") == last.config


def test_the_quickstart_sweep_is_whole():
    made = cells.load(ROOT / "configs/sweeps/quickstart.py")
    assert len(made) == 28
    assert len({table.sizes(cell.config)["n_total"] for cell in made}) == 7


def test_the_sweep_of_mixtures_is_enough_for_a_law():
    made = cells.load(ROOT / "configs/sweeps/mixtures.py")
    assert len(made) == 25
    assert len({cell.arm for cell in made}) == 5
    assert len({table.sizes(cell.config)["n_non_embedding"] for cell in made}) == 3
    assert len({cell.config.stage.full.steps for cell in made}) == 3
    assert all(sum(cell.config.stage.full.mixture.values()) == pytest.approx(1) for cell in made)


def test_native_and_modular_grow_from_their_language_model():
    file = ROOT / "configs/sweeps/native_modular.py"
    language = params.abstract(objectives.build(config_lib.load(f"{file}:language")))
    shapes = {path: spec.shape for path, spec in language.items()}
    for cell in cells.load(file):
        specs = params.abstract(objectives.build(cell.config))
        origins = grow.plan(shapes, specs)
        fresh = {path for path, origin in origins.items() if origin.source is None}
        trained = params.select(specs, cell.config.stage.full.trainable)
        assert cell.arm != "modular" or trained == {path for path in fresh if not path.startswith("layers/")}


# Runs

# Stands for a run: writes what train.py would, or ends as its cell's name says.
STUB = """
import json, pathlib, sys, time
workdir, name = pathlib.Path(sys.argv[1]), sys.argv[2]
with (workdir / "attempts").open("a") as file:
    file.write("x")
if name == "failed":
    sys.exit("Traceback...\\nerror: no such data")
if name == "diverged":
    print("error: 11 steps had a non-finite loss"); sys.exit({diverged})
if name == "stopped" and (workdir / "attempts").read_text() == "x":
    sys.exit({interrupted})
if name == "slow" and (workdir / "attempts").read_text() == "x":
    time.sleep(60)
seen = dict(tokens=1000, visual_tokens=300, supervised_tokens=500, images=33, documents=33, flops=6e9)
seen |= {"tokens/noto": 600, "tokens/fluent": 400}
lines = [dict(step=5, loss=3.0, source_loss=dict(noto=3.0), seen=seen)]
lines.append(dict(step=20, eval=dict(dev=2.5), eval_source=dict(dev=dict(noto=2.0, fluent=3.0)), seen=seen))
(workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
""".replace("{diverged}", str(EXIT_NONFINITE)).replace("{interrupted}", str(EXIT_INTERRUPTED))


class Stubbed(local.Sweep):
    def command(self, cell):
        return [sys.executable, "-c", STUB, str(self.run_folder(cell)), cell.name]


def stubbed(out: Path, *names: str, trunk: str = "") -> Stubbed:
    made = cells.build(base(), [Change(name, {}) for name in names])
    if trunk:
        made[-1] = Cell(made[-1].name, made[-1].config, trunk=trunk, branch_step=3)
    return Stubbed(Path("sweep.py"), made, out)


def run(sweep: local.Sweep, **kwargs) -> int:
    settings = {"jobs": 2, "retry": False, "after_each": lambda: None, "say": lambda line: None} | kwargs
    return local.run(sweep, **settings)


def attempts(sweep: local.Sweep) -> dict[str, int]:
    files = {cell.name: sweep.run_folder(cell) / "attempts" for cell in sweep.cells}
    return {name: len(file.read_text()) if file.exists() else 0 for name, file in files.items()}


def test_what_fails_and_diverges_is_kept_and_reported(tmp_path):
    sweep = stubbed(tmp_path, "good", "failed", "diverged", "branch", trunk="failed")
    assert run(sweep) == EXIT_OK
    assert attempts(sweep) == {"good": 1, "failed": 1, "diverged": 1, "branch": 0}
    rows = {row["name"]: row for row in table.write(sweep)}
    assert {name: row["status"] for name, row in rows.items()} == {
        "good": "done",
        "failed": "failed",
        "diverged": "diverged",
        "branch": "blocked",
    }
    assert rows["failed"]["message"] == "no such data"
    assert rows["branch"]["message"] == "its trunk failed failed"
    good = rows["good"]
    assert (good["tokens"], good["text_tokens"], good["image_tokens"], good["flops"]) == (1000, 700, 300, 6e9)
    assert (good["loss"], good["loss/noto"], good["loss/fluent"], good["train_loss"]) == (2.5, 2.0, 3.0, 3.0)
    assert (good["share/noto"], good["share/fluent"]) == (0.6, 0.4)
    assert (good["lr"], good["seed"]) == (base().stage.full.peak_lr, 0)
    written = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert pyarrow.parquet.read_table(tmp_path / "results.parquet").to_pylist() == written
    assert points.read(tmp_path) == written
    # The same again runs nothing; --retry runs what failed, and not what diverged.
    assert run(sweep) == EXIT_OK
    assert attempts(sweep)["failed"] == 1
    assert run(sweep, retry=True) == EXIT_OK
    assert attempts(sweep) == {"good": 1, "failed": 2, "diverged": 1, "branch": 0}


def test_a_trunk_that_alone_was_stopped_goes_on_with_its_branch(tmp_path):
    said = []
    sweep = stubbed(tmp_path, "stopped", "good", "branch", trunk="stopped")
    assert run(sweep, say=said.append) == EXIT_INTERRUPTED
    assert attempts(sweep) == {"stopped": 1, "good": 1, "branch": 0}
    assert "branch unfinished: its trunk stopped was stopped; run the sweep again" in said
    assert {row["name"]: row["status"] for row in table.write(sweep)} == {
        "stopped": "unfinished",
        "good": "done",
        "branch": "unfinished",
    }
    assert run(sweep) == EXIT_OK
    assert attempts(sweep) == {"stopped": 2, "good": 1, "branch": 1}


def test_an_interrupted_sweep_goes_on(tmp_path):
    script = (
        "import sys; sys.path.insert(0, '.')\n"
        "from tests.neo_jax import test_sweep as t; import pathlib\n"
        f"sys.exit(t.run(t.stubbed(pathlib.Path({str(tmp_path)!r}), 'slow', 'good'), jobs=1))"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    while not (tmp_path / "runs/slow/attempts").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.wait(30)
    sweep = stubbed(tmp_path, "slow", "good")
    assert process.returncode == EXIT_INTERRUPTED
    assert attempts(sweep) == {"slow": 1, "good": 0}  # nothing is started after the signal
    assert {row["status"] for row in table.write(sweep)} == {"unfinished"}
    assert run(sweep) == EXIT_OK
    assert attempts(sweep) == {"slow": 2, "good": 1}
    assert {row["status"] for row in table.write(sweep)} == {"done"}


SWEEP_FILE = """
from configs import quickstart
from neo_jax.sweep import cells, grids

def get_sweep():
    c = quickstart.get_config("tiny")
    c.stages = ("full",)
    c.stage = type(c.stage)({"full": c.stage.full})
    c.stage.full.warmup_steps, c.stage.full.schedule = 1, "wsd"
    c.eval.splits, c.train.log_every = ("dev",), 2
    return grids.cooldowns(c, [grids.size("s", width=32, layers=2, heads=2, peak_lr=2e-3)], (5, 10))

def get_config(name):
    return cells.find(get_sweep(), name)
"""


def test_the_command_runs_real_cells(tmp_path, quickstart_data, capfd, monkeypatch):
    """A trunk and its branch; then a table whose sums are those of the runs."""
    (tmp_path / "sweep.py").write_text(SWEEP_FILE)
    monkeypatch.chdir(ROOT)
    argv = [
        f"--config={tmp_path}/sweep.py",
        f"--workdir={tmp_path}/out",
        f"--config.data.path={quickstart_data.data.path}",
    ]

    def status():
        assert command.main(["status", *argv, "--json"]) == EXIT_OK
        *lines, counts = capfd.readouterr().out.splitlines()
        return lines, json.loads(counts)

    assert command.main(["expand", *argv]) == EXIT_OK
    cells_of = [line.partition(": ") for line in capfd.readouterr().out.splitlines()]
    assert [name for name, _, _ in cells_of] == ["s-D10", "s-D5"]
    assert all("-m neo_jax.train --config=" in line for _, _, line in cells_of)
    assert status()[1]["unfinished"] == 2
    assert not (tmp_path / "out").exists()  # neither of the two makes a folder
    assert command.main(["run", *argv, "--json"]) == EXIT_OK, capfd.readouterr().out
    said = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert (said["cells"], said["done"]) == (2, 2)
    lines, counts = status()
    assert counts == said
    assert lines[0].startswith("s-D10: done, step 10 of 10, loss ")
    longer, shorter = points.read(tmp_path / "out")
    assert (longer["steps_taken"], shorter["steps_taken"]) == (10, 5)
    assert shorter["trunk"] == "s-D10"
    assert shorter["tokens"] == pytest.approx(
        longer["tokens"] / 2, rel=0.1
    )  # those of its trunk are its own too
    assert shorter["text_tokens"] + shorter["image_tokens"] == shorter["tokens"]
    assert shorter["flops"] == pytest.approx(longer["flops"] / 2, rel=0.1)
    assert all(math.isfinite(one["loss"]) and one["loss/noto"] > 0 for one in (longer, shorter))
    for name in ("run", "status"):
        with pytest.raises(UserError, match=r"with another config.*stage.full.peak_lr: 0.002 -> 0.001"):
            command.main([name, *argv, "--config.stage.full.peak_lr=1e-3"])
    # The runs' own records say the same of them, as of runs that a launcher made.
    for path in [*(tmp_path / "out").glob("runs/*/cell.json"), *(tmp_path / "out").glob("results.*")]:
        path.unlink()
    assert status() == (lines, counts)
    unknown = {"seconds": None}
    assert points.read(tmp_path / "out") == [longer | unknown, shorter | unknown]


def launched(tmp_path: Path, write) -> tuple[list[str], dict[str, dict]]:
    """Cells as the launcher's files for three CPUs run them; `write(name)` gives the lines they log."""
    (tmp_path / "sweep.py").write_text(SWEEP_FILE)
    argv = [f"--config={tmp_path}/sweep.py", f"--workdir={tmp_path}/out"]
    assert command.main(["expand", *argv, "--launch=--backend=local --topology=cpu:3"]) == EXIT_OK
    for file in (tmp_path / "out/launch").glob("*.sh"):
        flags = dict(re.findall(r"--(config|workdir|config\.[\w.]+)=(\S+)", file.read_text()))
        spec, workdir = flags.pop("config"), Path(flags.pop("workdir"))
        overrides = [(field.removeprefix("config."), text) for field, text in flags.items()]
        workdir_lib.claim(workdir, config_lib.load(spec, overrides))
        lines = write(workdir.name)
        (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert command.main(["status", *argv]) == EXIT_OK
    return argv, {row["name"]: row for row in points.read(tmp_path / "out")}


SEEN = {"tokens": 1000, "visual_tokens": 300, "images": 33, "flops": 6e9}


def logged(steps: int, **others) -> dict:
    return {"step": steps, "loss": 3.0, "source_loss": {}, "nonfinite_steps": 0, "seen": SEEN} | others


def evaluated(steps: int) -> dict:
    return {"step": steps, "eval": {"dev": 2.5}, "eval_source": {"dev": {}}, "seen": SEEN}


def test_status_gathers_cells_that_a_launcher_ran(tmp_path, capsys):
    lines = {"s-D10": [logged(10), evaluated(10)], "s-D5": [logged(4)]}
    argv, rows = launched(tmp_path, lines.__getitem__)
    told = capsys.readouterr().out
    assert "s-D10: done, step 10 of 10, loss 2.5000\ns-D5: unfinished, step 4 of 5\n" in told
    assert (rows["s-D10"]["status"], rows["s-D10"]["loss"]) == ("done", 2.5)
    # The batch of 4 became 6, which three devices share: the table tells what was run.
    assert cells.load(tmp_path / "sweep.py")[0].config.stage.full.batch_size == 4
    assert rows["s-D10"]["batch_size"] == 6
    moved = tmp_path / "out" / ".." / "out"  # the same folder as another machine may name it
    assert command.main(["status", argv[0], f"--workdir={moved}"]) == EXIT_OK
    with pytest.raises(UserError, match=r"with another config.*batch_size: 6 -> 9"):
        command.main(["status", *argv, "--config.stage.full.batch_size=7"])


@pytest.mark.parametrize(
    ("lines", "doing", "status"),
    [
        ([evaluated(5)], None, "done"),
        ([evaluated(5)], ("ended", 5), "done"),
        ([evaluated(5)], ("save", 5), "unfinished"),  # the last checkpoint is being written
        ([logged(5)], ("ended", 5), "unfinished"),  # a signal broke off the evaluation
        ([logged(3, nonfinite_steps=11, loss=math.nan)], ("ended", 3), "diverged"),
        ([logged(3, nonfinite_steps=2, loss=math.nan)], ("ended", 3), "unfinished"),  # it may recover
        ([evaluated(5) | {"eval": {"dev": math.nan}}], None, "diverged"),
        ([], None, "unfinished"),
    ],
)
def test_a_runs_own_records_say_how_it_ended(tmp_path, lines, doing, status):
    sweep = stubbed(tmp_path, "cell")
    sweep = dataclasses.replace(sweep, overrides=(("stage.full.steps", "5"),))
    workdir = sweep.run_folder(sweep.cells[0])
    workdir.mkdir(parents=True)
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if doing is not None:
        (workdir / "events.jsonl").write_text(
            json.dumps({"time": 0, "doing": doing[0], "step": doing[1]}) + "\n"
        )
    assert [row["status"] for row in table.write(sweep)] == [status]


def test_launcher_files_name_the_cells_config_and_their_trunks_checkpoint(tmp_path, capsys):
    (tmp_path / "sweep.py").write_text(SWEEP_FILE)
    argv = ["expand", f"--config={tmp_path}/sweep.py", "--workdir=/shared/sweep", f"--files={tmp_path}/files"]
    assert command.main([*argv, "--launch=--backend=slurm --topology=h100:1"]) == EXIT_OK
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/files/s-d10.sh",
        f"{tmp_path}/files/s-d5.sh after s-d10",
    ]
    text = (tmp_path / "files/s-d5.sh").read_text()
    assert f"--config={tmp_path}/sweep.py:s-D5" in text
    assert "--workdir=/shared/sweep/runs/s-D5" in text
    assert "--config.branch=/shared/sweep/runs/s-D10/checkpoints/4" in text
    with pytest.raises(UserError, match="--name is the cell's"):
        command.main([*argv, "--launch=--backend=slurm --topology=h100:1 --name=x"])


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("model.hiden_size=8", "--config.model.hiden_size: no such field; did you mean model.hidden_size"),
        ("seed=many", "--config.seed: expected int, got 'many'"),
    ],
)
@pytest.mark.parametrize("launch", [(), ("--launch=--backend=slurm --topology=h100:1",)])
def test_expand_refuses_fields_that_no_cell_can_have(tmp_path, capsys, field, message, launch):
    (tmp_path / "sweep.py").write_text(SWEEP_FILE)
    argv = [f"--config={tmp_path}/sweep.py", f"--workdir={tmp_path}/out", f"--config.{field}"]
    with pytest.raises(UserError, match=message):
        command.main(["expand", *argv, *launch])
    assert not capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("get_sweep = 3", "has no function get_sweep()"),
        ("def get_sweep():\n    return 1 / 0\nget_config = get_sweep", "line 2: ZeroDivisionError"),
    ],
)
def test_sweep_files_that_are_wrong(tmp_path, text, message):
    file = tmp_path / "sweep.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError) as caught:
        command.main(["run", f"--config={file}", f"--workdir={tmp_path}/out"])
    assert message in str(caught.value)
