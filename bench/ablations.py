"""Writes the tables and plots of docs/ablations.md from bench/results/ablations*.json.

python bench/ablations.py              updates the page and the plots
python bench/ablations.py DIR NAME     first copies the results of moco-ext ablate --output DIR to NAME.json
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
    parser.add_argument("directory", nargs="?", type=Path, metavar="DIR")
    parser.add_argument("name", nargs="?", default="ablations", metavar="NAME", help="ablations, or starting with it")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    if arguments.directory:
        results = json.loads((arguments.directory / "results.json").read_text())
        write_json(RESULTS / f"{arguments.name}.json", results)
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


if __name__ == "__main__":
    sys.exit(main())
