"""Writes the tables and plots of docs/ablations.md from bench/results/ablations*.json.

python bench/ablations.py              updates the page and the plots
python bench/ablations.py DIR... --name NAME    first joins the results of moco-ext ablate --output DIR in NAME.json
python bench/ablations.py --check      fails if the page is out of date
"""

import argparse
import json
import re
import sys
from pathlib import Path

from moco_ext.report.ablation import markdown, write_plots
from moco_ext.runs.files import write_json

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "ablations.md"
PLOTS = ROOT / "docs" / "ablations"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", nargs="*", type=Path, metavar="DIR")
    parser.add_argument("--name", default="ablations", help="ablations, or starting with it")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    if arguments.directories:
        write_json(RESULTS / f"{arguments.name}.json", joined(arguments.directories))
    text = filled = PAGE.read_text()
    for path in sorted(RESULTS.glob("ablations*.json")):
        results, name = json.loads(path.read_text()), path.stem
        section = markdown(results)
        pattern = rf"(<!-- {name}:start -->\n).*?(<!-- {name}:end -->)"
        filled, found = re.subn(pattern, lambda match: f"{match[1]}{section}\n{match[2]}", filled, flags=re.DOTALL)  # noqa: B023
        if not found:
            sys.exit(f"expected <!-- {name}:start --> and <!-- {name}:end --> in {PAGE}, got neither")
        if not arguments.check:
            folder = PLOTS / name.removeprefix("ablations").removeprefix("-")
            folder.mkdir(exist_ok=True)
            write_plots(results, folder)
    if arguments.check:
        if filled != text:
            print(f"{PAGE.name}: its figures are not those of bench/results; run python {sys.argv[0]}", file=sys.stderr)
        return int(filled != text)
    PAGE.write_text(filled)
    return 0


def joined(directories: list[Path]) -> dict:
    """The results of one base configuration, in several directories; the first run of a name counts."""
    results, *others = [json.loads((directory / "results.json").read_text()) for directory in directories]
    for other in others:
        for title, rows in other["tables"].items():
            known = results["tables"].setdefault(title, [])
            known += [row for row in rows if row not in known]
        names = {run["name"] for run in results["runs"]}
        results["runs"] += [run for run in other["runs"] if run["name"] not in names]
    return results


if __name__ == "__main__":
    sys.exit(main())
