"""``python -m benchmarks NAME [--quick]``: tables on the screen and JSON beside them."""

import argparse
import importlib

from benchmarks.common import Report

parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
parser.add_argument("name", choices=["gmm", "linear", "logistic", "vae"])
parser.add_argument("--quick", action="store_true", help="the small sizes only")
arguments = parser.parse_args()
report = Report(arguments.name)
importlib.import_module(f"benchmarks.{arguments.name}").run(report, quick=arguments.quick)
report.save()
