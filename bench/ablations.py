"""Tables and plots of docs/ablations.md, from bench/results/ablations.json; no figure in them is typed.

python bench/ablations.py              writes them
python bench/ablations.py DIR          first takes over the results of moco-ext ablate --output DIR
python bench/ablations.py --check      fails if the page does not hold them already
"""

import argparse
import json
import re
import sys
from pathlib import Path

from moco_ext.report.ablation import markdown, write_plots
from moco_ext.runs.files import write_json

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results" / "ablations.json"
PAGE = ROOT / "docs" / "ablations.md"
PLOTS = ROOT / "docs" / "ablations"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="?", type=Path, metavar="DIR")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    if arguments.directory:
        write_json(RESULTS, json.loads((arguments.directory / "results.json").read_text()))
    results = json.loads(RESULTS.read_text())
    text = PAGE.read_text()
    section = markdown(results)
    pattern = r"(<!-- ablations:start -->\n).*?(<!-- ablations:end -->)"
    filled, found = re.subn(pattern, lambda match: f"{match[1]}{section}\n{match[2]}", text, flags=re.DOTALL)
    if not found:
        sys.exit(f"expected <!-- ablations:start --> and <!-- ablations:end --> in {PAGE}, got neither")
    if arguments.check:
        if filled != text:
            print(f"{PAGE.name}: its figures are not those of bench/results; run python {sys.argv[0]}", file=sys.stderr)
        return int(filled != text)
    PAGE.write_text(filled)
    PLOTS.mkdir(exist_ok=True)
    write_plots(results, PLOTS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
