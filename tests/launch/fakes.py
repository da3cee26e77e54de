"""Executables that stand in for a cluster's commands: they write down what they are called with."""

import json
import os
import sys
from pathlib import Path

_SCRIPT = """#!{python}
import json, os, sys
with open({calls!r}, "a") as calls:
    stdin = "" if sys.stdin.isatty() or not {reads!r} else sys.stdin.read()
    calls.write(json.dumps({{"argv": [{name!r}, *sys.argv[1:]], "stdin": stdin}}) + "\\n")
answers = {answers!r}
words = " ".join(sys.argv[1:])
for part, (code, *texts) in answers.items():
    if part in words:
        count_file = {folder!r} + "/" + part.replace(" ", "_").replace("/", "_") + ".count"
        count = int(open(count_file).read()) if os.path.exists(count_file) else 0
        open(count_file, "w").write(str(count + 1))
        print(texts[min(count, len(texts) - 1)], end="")
        sys.exit(code)
"""


class Commands:
    """A folder of fake executables to put in front of PATH."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._calls = folder / "calls.jsonl"

    def add(self, name: str, answers: dict[str, tuple] | None = None, reads: bool = False) -> None:
        """`answers`: part of the arguments -> (exit code, what it prints the first time, the second, ...)."""
        path = self.folder / name
        path.write_text(
            _SCRIPT.format(
                python=sys.executable,
                calls=str(self._calls),
                name=name,
                answers=answers or {},
                folder=str(self.folder),
                reads=reads,
            )
        )
        path.chmod(0o755)

    @property
    def path(self) -> str:
        return f"{self.folder}{os.pathsep}{os.environ['PATH']}"

    @property
    def calls(self) -> list[dict]:
        return (
            [json.loads(line) for line in self._calls.read_text().splitlines()]
            if self._calls.exists()
            else []
        )

    @property
    def argvs(self) -> list[list[str]]:
        return [call["argv"] for call in self.calls]
