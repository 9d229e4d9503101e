"""One self-contained HTML page about a run, or comparing several."""

from .page import compose, write_report
from .read import Gallery, ReportedRun, galleries, read_run

__all__ = ["Gallery", "ReportedRun", "compose", "galleries", "read_run", "write_report"]
