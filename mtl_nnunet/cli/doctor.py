"""``mtl-nnunet doctor``: what is installed and set up here, and what is wrong with it."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mtl_nnunet.errors import UserError

if TYPE_CHECKING:
    from mtl_nnunet.doctor import Finding


def add_parser(commands: Any) -> None:
    """Add the command's options; nothing heavy is imported to build them."""
    parser = commands.add_parser(
        "doctor",
        help="say what is wrong with the installation, and what to do",
        description="Look at versions, nnU-Net's variables and its look-up of trainers, GPUs, folders, datasets and selections. Nothing is "
        "changed. Exits with status 1 where something will fail.",
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.set_defaults(command=report)


def report(args: argparse.Namespace) -> None:
    """Print the findings.

    Raises:
        UserError: Something will fail.
    """
    from mtl_nnunet.doctor import PROBLEM, examine

    findings: list[Finding] = []
    for finding in examine():
        if not args.json:
            if not findings or finding.topic != findings[-1].topic:
                print(finding.topic)
            remedy = f"\n  {'':<8}-> {finding.remedy}" if finding.remedy else ""
            print(f"  {finding.state:<8}{finding.said}{remedy}", flush=True)
        findings.append(finding)
    if args.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    problems = [finding.said for finding in findings if finding.state == PROBLEM]
    if problems:
        many = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError(f"{many}, the first: {problems[0]}. What to do stands above.")
