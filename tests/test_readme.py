"""The README only names what exists: its files, its commands and their flags."""

import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
PRODUCED = {"data/quickstart", "runs/quickstart", "runs/quickstart/report.html"}  # by `make train`


def test_files_exist():
    named = set(re.findall(r"`((?:neo_jax|data_pipelines|configs|tests|data|runs)/[\w./]*)`", TEXT))
    assert len(named) > 20
    assert [name for name in sorted(named - PRODUCED) if not (ROOT / name).exists()] == []


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^make ([\w-]+)|`make ([\w-]+)", TEXT, re.MULTILINE))
    assert targets
    for target in {one or other for one, other in targets}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


CONVERT, LAUNCH = ("export", "import", "verify"), ("render", "validate", "submit", "status")
SUBCOMMANDS = (*CONVERT, *LAUNCH, "fit", "advise", "expand", "run")  # a sweep has a status, too
COMMANDS = sorted(set(re.findall(rf"python -m ([\w.]+)((?: {'| '.join((*SUBCOMMANDS, 'ls'))})?)", TEXT)))


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize(("module", "subcommand"), COMMANDS)
def test_commands_and_their_flags_exist(module, subcommand, monkeypatch, capsys):
    """As `python -m` runs them, but in this process: importing everything anew takes seconds."""
    named = [subcommand.strip()] if subcommand.strip() in SUBCOMMANDS else []
    monkeypatch.setattr(sys, "argv", [module, *named, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert not end.value.code
    said = capsys.readouterr().out
    for line in TEXT.splitlines():
        if f"python -m {module}{subcommand}" in line:
            for flag in re.findall(r"--[a-z_]+", line.partition("|  ")[0]):
                assert flag in said, f"{module} has no {flag}"
