"""What a run was made with: command, versions, device, commit."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from .. import __version__


def environment(device: torch.device) -> dict[str, Any]:
    """Command line, directory, versions and device of this process; the package's commit, of a git checkout."""
    program, *arguments = sys.argv
    name = "moco-ext" if Path(program).name in ("moco-ext", "__main__.py") else program
    commit, changed = _checkout(Path(__file__).parents[1])
    return {
        "command": shlex.join([name, *arguments]),
        "directory": os.getcwd(),
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "moco_ext": __version__,
        "commit": commit,
        "changed": changed,
    }


def _checkout(package: Path) -> tuple[str | None, bool]:
    """The commit, and whether the package differs from it; (None, False) for an installed package."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=package, capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # fails for a virtual environment inside a repository
        return git("rev-parse", "--short=10", "HEAD"), bool(git("status", "--porcelain", "--", "."))
    except (OSError, subprocess.SubprocessError):
        return None, False


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    return found[1].strip() if found else platform.processor()
