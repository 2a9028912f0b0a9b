"""``mtl-nnunet fit-chooser``: learn from tables of real trainings which checkpoint to expect least loss from."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from mtl_nnunet.cli.command import add_json, answers_json
from mtl_nnunet.cli.evaluate_scores import add_drop_option, dropped
from mtl_nnunet.errors import UserError, listed

LEFT_OUT = ("dataset", "encoder")
# the file grows with their square
MOST_SCORES = 40


def add_parser(commands: Any) -> None:
    """Add the command's options; nothing heavy is imported to build them."""
    parser = commands.add_parser(
        "fit-chooser",
        help="learn a decision rule from tables of real trainings",
        description="Fit a prior over epochs and what scores add to it, on tables of downstream results, and say how well it "
        "chooses on targets and encoders that it was not fitted on. Tables are as for evaluate-scores.",
    )
    parser.add_argument("-downstream", required=True, nargs="+", metavar="CSV", help="tables of downstream results")
    parser.add_argument(
        "-scores", nargs="+", default=[], metavar="CSV", help="tables of scores, one for each of -downstream"
    )
    parser.add_argument("-use", nargs="+", default=[], metavar="SCORE", help="scores that enter, as typed for -score")
    add_drop_option(parser)
    parser.add_argument("-o", required=True, metavar="JSON", help="where to write the chooser")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier one")
    add_json(parser, "what was fitted and how well it chooses")
    parser.set_defaults(command=answers_json(fit_chooser))


def fit_chooser(args: argparse.Namespace) -> dict[str, Any]:
    """Fit, judge on what is left out, print and write."""
    import datetime
    import importlib.metadata

    from mtl_nnunet import __version__
    from mtl_nnunet.chooser import Chooser, value_at_levels, write_chooser
    from mtl_nnunet.chooser_fit import fit_state, hold_out, verdict
    from mtl_nnunet.curves import read_curves
    from mtl_nnunet.files import sha256

    _refuse_foreign_file(Path(args.o), [*args.downstream, *args.scores], args.overwrite)
    if args.scores and len(args.scores) != len(args.downstream):
        raise UserError(
            f"-scores names {len(args.scores)} tables and -downstream {len(args.downstream)}: expected one for each."
        )
    if args.use and not args.scores:
        raise UserError("-use names scores, and there is no table of them. Pass -scores CSV.")
    if len(args.use) > MOST_SCORES or len(set(args.use)) < len(args.use):
        raise UserError(f"-use names {len(args.use)} scores; expected at most {MOST_SCORES}, each once.")
    tables = zip(args.downstream, args.scores or [None] * len(args.downstream), strict=True)
    curves = dropped([c for d, s in tables for c in read_curves(Path(d), s and Path(s))], args.drop)
    labels = [c.label for c in curves]
    if len(set(labels)) < len(labels):
        twice = next(label for label in labels if labels.count(label) > 1)
        raise UserError(f"curve {twice} stands in two of the tables. Give each pretraining its own column 'run'.")
    lacking = [name for name in args.use if all(value_at_levels(c.scores, name) is None for c in curves)]
    if lacking:
        there = listed(sorted({name for c in curves for name in c.scores}))
        raise UserError(f"no score '{lacking[0]}' in the tables. There: {there or 'none'}.")

    states, judged = {}, []
    for state in sorted({c.state for c in curves}):
        own = [c for c in curves if c.state == state]
        scored = tuple(name for name in args.use if any(value_at_levels(c.scores, name) is not None for c in own))
        states[state] = fit_state(own, scored)
        for by in LEFT_OUT:
            if len({getattr(c, by) for c in own}) < 2:
                continue
            for names in [(), scored] if scored else [()]:
                judged.append((state, by, len(own), bool(names), verdict(hold_out(own, names, by))))
    provenance = {
        "version": __version__,
        "packages": {name: importlib.metadata.version(name) for name in ("numpy", "scipy", "pandas")},
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "command": f"mtl-nnunet {shlex.join(sys.argv[1:])}",
        "tables": {Path(path).name: sha256(path) for path in [*args.downstream, *args.scores]},
        "curves": len(curves),
        **{f"{k}s": sorted({getattr(c, k) for c in curves}) for k in ("dataset", "encoder", "scheme")},
        "held_out": [
            {
                "state": state,
                "left_out": by,
                "with_scores": with_scores,
                **{
                    k: {f"{b:.2f}": r for b, r in v.items()} if isinstance(v, dict) else v
                    for k, v in vars(told).items()
                },
            }
            for state, by, _, with_scores, told in judged
        ],
    }
    write_chooser(Chooser(states, provenance), args.o)
    print(verdict_text(judged))
    print(f"written: {args.o} ({len(curves)} curves)")
    return {"file": args.o, "sha256": sha256(args.o), **provenance}


def _refuse_foreign_file(file: Path, tables: list[str], overwrite: bool) -> None:
    from mtl_nnunet.chooser import is_chooser

    if file.resolve() in {Path(table).resolve() for table in tables}:
        raise UserError(f"-o {file} is one of the tables that are read, and would be replaced. Pass -o another file.")
    if not file.exists():
        return
    if not overwrite:
        raise UserError(f"{file} exists already. Pass --overwrite to replace it, or -o another file.")
    if not is_chooser(file):
        raise UserError(f"{file} is no chooser, so it is not overwritten. Pass -o another file.")


def verdict_text(judged: list[Any]) -> str:
    """How it does on what was left out, as a table; losses in Dice points, budgets as shares of the pretraining."""
    budgets = list(judged[0][-1].regret) if judged else []
    head = f"{'state':7}{'left out':10}{'curves':>6}  {'by':8}"
    head += "".join(f"{f'at {b:.2f} (fixed)':>20}" for b in budgets)
    lines = ["Mean loss in Dice points of what was left out, at the same mean budget, and of always stopping there:"]
    lines.append(f"{head}{'no price (share)':>20}{'last':>7}{'held in 90 %':>14}{'expected/measured':>20}{'tau':>7}")
    for state, by, count, with_scores, told in judged:
        cells = "".join(f"{f'{100 * told.regret[b]:.2f} ({100 * told.fixed[b]:.2f})':>20}" for b in budgets)
        lines.append(
            f"{state:7}{by:10}{count:6}  {'scores' if with_scores else 'epochs':8}{cells}"
            f"{f'{100 * told.free_regret:.2f} ({told.free_share:.2f})':>20}{100 * told.last:7.2f}{told.coverage:14.0%}"
            f"{f'{100 * told.expected:.2f}/{100 * told.measured:.2f}':>20}{told.tau:7.2f}"
        )
    return "\n".join(lines)
