"""``python -m benchmarks gmm|linear|logistic|vae [--quick]``: tables on the screen, and as JSON."""

import argparse
import importlib
from typing import Any

from benchmarks.common import Report

parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
parser.add_argument("name", choices=["gmm", "linear", "logistic", "vae"])
parser.add_argument(
    "--quick",
    action="store_true",
    help="the small sizes only, and no training on MNIST unless --only names it",
)
parser.add_argument("--only", nargs="+", metavar="PART", help="gmm and vae: some tables only")
parser.add_argument(
    "--budget",
    type=float,
    nargs="+",
    metavar="MINUTES",
    help="vae only: train on binarised MNIST for so long, beside the plain loop",
)
arguments = parser.parse_args()
options: dict[str, Any] = {"quick": arguments.quick}
for option, owners in (("only", ("gmm", "vae")), ("budget", ("vae",))):
    if getattr(arguments, option):
        if arguments.name not in owners:
            parser.error(f"--{option} belongs to {' and '.join(owners)}")
        options[option] = getattr(arguments, option)
report = Report(arguments.name)
importlib.import_module(f"benchmarks.{arguments.name}").run(report, **options)
report.save()
