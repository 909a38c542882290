"""``python -m benchmarks gmm|linear|vae [--quick]``: tables on the screen and JSON beside them."""

import argparse
import importlib

from benchmarks.common import Report

parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
parser.add_argument("name", choices=["gmm", "linear", "vae"])
parser.add_argument("--quick", action="store_true", help="the small sizes only")
parser.add_argument("--only", nargs="+", default=[], help="parts of the mixture's tables")
arguments = parser.parse_args()
report = Report(arguments.name)
choice = {"only": arguments.only} if arguments.name == "gmm" else {}
importlib.import_module(f"benchmarks.{arguments.name}").run(report, quick=arguments.quick, **choice)
report.save()
