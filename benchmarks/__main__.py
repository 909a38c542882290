"""``python -m benchmarks gmm|linear|vae [--quick]``: tables on the screen and JSON beside them."""

import argparse
import importlib

from benchmarks.common import Report

parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
parser.add_argument("name", choices=["gmm", "linear", "vae"])
parser.add_argument("--quick", action="store_true", help="the small sizes only")
parser.add_argument(
    "--budget",
    type=float,
    nargs="+",
    metavar="MINUTES",
    help="vae only: train on binarised MNIST for so long, beside the plain loop, and nothing else",
)
arguments = parser.parse_args()
options = {"quick": arguments.quick}
if arguments.budget:
    if arguments.name != "vae":
        parser.error("--budget belongs to vae")
    options["budget"] = arguments.budget
report = Report(arguments.name)
importlib.import_module(f"benchmarks.{arguments.name}").run(report, **options)
report.save()
