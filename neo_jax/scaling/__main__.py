"""Fits scaling laws to runs, and gives the model and data for a budget.

python -m neo_jax.scaling fit --results=FILE|DIR --out=DIR
python -m neo_jax.scaling advise --preset=NAME|--fit=FILE --flops=C
"""

import argparse
import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from neo_jax import metrics, validate
from neo_jax.errors import UserError, main_guard
from neo_jax.scaling import figures, page, parametric, points as points_lib, presets, results as results_lib
from neo_jax.scaling.figures import Curve
from neo_jax.scaling.law import FLOPS_PER_PARAMETER_AND_TOKEN, NAMES, Law, or_zero
from neo_jax.scaling.presets import Advice, Anchor, Exponents
from neo_jax.scaling.results import Results, Settings


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m neo_jax.scaling", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    fit = commands.add_parser(
        "fit", help="fit laws to a table of runs; writes fit.json, report.html and plots"
    )
    fit.add_argument(
        "--results", type=pathlib.Path, required=True, help="CSV, JSON lines, Parquet, or a sweep's folder"
    )
    fit.add_argument(
        "--out", type=pathlib.Path, required=True, help="folder for fit.json, report.html, plots"
    )
    fit.add_argument("--n", default=points_lib.N, help="column of the parameters (default %(default)s)")
    fit.add_argument("--d", help="column of the training tokens; without --d, D = C / 6N")
    fit.add_argument("--c", help="column of the training FLOPs; without --c, C = 6ND")
    fit.add_argument("--loss", default=points_lib.LOSS, help="column of the loss (default %(default)s)")
    fit.add_argument(
        "--drop_highest", type=int, default=0, metavar="K", help="leave out the K runs of highest loss"
    )
    fit.add_argument(
        "--delta", type=float, default=parametric.DELTA, help="of the Huber loss (default %(default)s)"
    )
    fit.add_argument(
        "--bootstrap", type=int, default=200, metavar="K", help="draws for intervals (default 200)"
    )
    fit.add_argument("--seed", type=int, default=0, help="of the draws")
    fit.add_argument(
        "--min_flops", type=float, default=0.0, help="runs of fewer FLOPs take no part in exponent c"
    )
    fit.add_argument("--by", help="column that tells arms apart (default arm, if there is one)")
    fit.add_argument("--json", action="store_true", help="print fit.json as the last line")
    advise = commands.add_parser("advise", help="N and D for a budget, by a published law or a fit")
    law = advise.add_mutually_exclusive_group(required=True)
    law.add_argument("--preset", help=f"one of {', '.join(presets.PRESETS)}")
    law.add_argument("--fit", type=pathlib.Path, help="fit.json of a fit")
    advise.add_argument("--flops", type=float, required=True, help="budget, such as 1e22")
    advise.add_argument("--anchor", metavar="N@FLOPS", help="an optimal model that the frontier goes through")
    advise.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args(argv)
    if args.command == "fit":
        run_fit(args)
    else:
        run_advise(args)


def run_fit(args: argparse.Namespace) -> None:
    for name, least in (("drop_highest", 0), ("bootstrap", 0), ("seed", 0), ("min_flops", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name}={getattr(args, name)}: at least {least}")
    for name in ("delta", "min_flops"):
        if not math.isfinite(getattr(args, name)):
            raise UserError(f"--{name}={getattr(args, name)}: must be a finite number")
    if not args.delta > 0:
        raise UserError(f"--delta={args.delta:g}: must be positive")
    columns = {name: getattr(args, name) for name in ("n", "d", "c", "loss", "drop_highest")}
    rows = points_lib.read(args.results)
    names = sorted(set().union(*rows))
    if args.by is not None and args.by not in names:
        nearest = validate.nearest(args.by, names)
        raise UserError(f"--by={args.by}: the results have no such column; did you mean {nearest}?")
    settings = Settings(columns, args.delta, args.bootstrap, args.seed, args.min_flops, args.by or "arm")
    results = results_lib.analyse(rows, settings)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(f"--out={args.out} is a file; name a folder") from None
    found = results_lib.as_json(results)
    (args.out / "fit.json").write_text(json.dumps(found, indent=2) + "\n")
    drawn = draw(results, curves(args.results, rows), args.out)
    made_by = f"python -m neo_jax.scaling fit --results={args.results} --out={args.out}"
    (args.out / "report.html").write_text(page.render(results, drawn, made_by))
    print(_told(results))
    print(f"wrote {args.out}/fit.json, report.html and {len(drawn)} plots as PNG and SVG")
    if args.json:
        print(json.dumps(found))


def draw(results: Results, runs: Sequence[Curve], out: pathlib.Path) -> dict[str, str]:
    """Draws and saves what there is to draw: name -> SVG."""
    points, fitted = results.points, results.fitted
    made: dict[str, Any] = {}
    if runs:
        made["loss_curves"] = figures.loss_curves(runs)
    if results.valleys:
        made["valleys"] = figures.valleys(points, results.valleys)
    made["allocation"] = figures.allocation(points, fitted, results.frontier, results.valleys)
    made["loss_frontier"] = figures.loss_frontier(points, results.frontier)
    made["residuals"] = figures.residuals(points, fitted)
    if fitted.draws:
        made["intervals"] = figures.intervals(fitted)
    if results.prediction is not None:
        made["held_out"] = figures.held_out(results.prediction)
    if results.sources:
        made["sources"] = figures.laws({name: fit.law for name, fit in results.sources.items()}, points)
    if results.arms:
        made["arms"] = figures.laws({name: fit.law for name, fit in results.arms.items()}, points)
    return {name: figures.save(figure, out, name) for name, figure in made.items()}


def curves(results: pathlib.Path, rows: Sequence[points_lib.Row]) -> list[Curve]:
    """Training loss over FLOPs of the runs of a sweep's folder; [] for a table from elsewhere."""
    folder = results if results.is_dir() else results.parent
    found: list[Curve] = []
    for row in rows:
        if row.get("workdir"):
            lines = metrics.read(folder / str(row["workdir"]) / "metrics.jsonl")
            line = [(one["seen"]["flops"], one["loss"]) for one in lines if "loss" in one]
            if line:
                found.append((str(row["name"]), line))
    return found


def run_advise(args: argparse.Namespace) -> None:
    law: Law | Exponents
    if args.preset:
        law, flops_per_nd = presets.preset(args.preset), FLOPS_PER_PARAMETER_AND_TOKEN
    else:
        law, flops_per_nd = fitted_law(args.fit)
    advice = presets.advise(law, args.flops, anchor(args.anchor, law), flops_per_nd)
    loss = "" if advice.loss is None else f", for a loss of {advice.loss:.3f}"
    print(f"for {advice.flops:.3g} FLOPs train {advice.n:.3g} parameters on {advice.d:.3g} tokens{loss}")
    if advice.assumption:
        print(f"note: {advice.assumption}")
    if args.json:
        print(json.dumps(as_json(advice, law)))


def as_json(advice: Advice, law: Law | Exponents) -> dict[str, Any]:
    """The advice and the law it is from."""
    return dataclasses.asdict(advice) | {"law": dataclasses.asdict(law)}


def fitted_law(path: pathlib.Path) -> tuple[Law, float]:
    """(the law in a fit.json, C / (N D) of its runs)."""
    if not path.is_file():
        raise UserError(f"--fit={path}: no such file; name the fit.json of a fit")
    try:
        found = json.loads(path.read_text())
        return Law(**{name: float(found[name]) for name in NAMES}), float(found["flops_per_nd"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--fit={path}: holds no law ({error!r})") from error


def anchor(text: str | None, law: Law | Exponents) -> Anchor | None:
    """Reads --anchor."""
    if text is None:
        return None
    if isinstance(law, Law):
        raise UserError("--anchor: this law has its own factors; an anchor is for presets of exponents only")
    try:
        n, flops = map(float, text.split("@"))
    except ValueError:
        raise UserError(f"--anchor={text}: write N@FLOPS, such as 1e9@1e20") from None
    if not (n > 0 and flops > 0):
        raise UserError(f"--anchor={text}: both numbers are positive")
    return Anchor(flops, n)


def _told(results: Results) -> str:
    """The law, for a person."""
    lines = []
    for name in NAMES:
        interval = parametric.interval([getattr(law, name) for law in results.fitted.draws])
        value, low, high = (
            or_zero(name, number) for number in (getattr(results.fitted.law, name), *interval)
        )
        lines.append(f"{name:>6} = {value:.5g}   (90 %: {low:.4g} to {high:.4g})")
    if results.mixtures is not None:
        for advice in results.mixtures.advice:
            shares = zip(results.mixtures.sources, advice.weights, strict=True)
            told = ", ".join(f"{name} {share:.1%}" for name, share in shares)
            lines.append(f"least loss ({advice.target}) with shares of {told}")
    if results.no_mixtures:
        lines.append(f"no law over mixtures: {results.no_mixtures}")
    lines += [f"left out: {name}: {reason}" for name, reason in results.points.left_out]
    return "\n".join([*lines, *(f"note: {warning}" for warning in results.warnings)])


if __name__ == "__main__":
    main_guard(main)
