"""The commands in README and docs exist, and shell scripts and manifests are well formed."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("torchvision")
pytest.importorskip("yaml")
import yaml

from moco_ext.cli import COMMANDS, build_parser

ROOT = Path(__file__).parent.parent
if not (ROOT / "docs").is_dir():
    pytest.skip("the docs are not next to the tests", allow_module_level=True)
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


def blocks(language: str) -> list[tuple[str, str]]:
    """(page, content) of each block of code in a language."""
    pattern = re.compile(rf"^```{language}\n(.*?)^```", re.DOTALL | re.MULTILINE)
    return [(page.name, block) for page in PAGES for block in pattern.findall(page.read_text())]


def commands() -> list[tuple[str, list[str]]]:
    """(page, arguments) of each ``moco-ext`` and ``python -m moco_ext``."""
    found = []
    for page, block in blocks("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "moco-ext" in words:
                found.append((page, words[words.index("moco-ext") + 1 :]))
            elif "moco_ext" in words and words[words.index("moco_ext") - 1] == "-m":
                found.append((page, words[words.index("moco_ext") + 1 :]))
    return found


def test_there_are_commands():
    assert len(commands()) > 40
    assert {words[0] for _, words in commands() if words} >= {
        "pretrain",
        "linear",
        "shard",
        "convert",
        "detect",
        "segment",
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_and_flags_exist(command):
    known = {flag for action in build_parser(command).of_command._actions for flag in action.option_strings}
    trainer = {flag for action in build_parser("pretrain").of_command._actions for flag in action.option_strings}
    for page, words in commands():
        if not words or words[0] != command:
            continue
        end = words.index("--") if "--" in words else len(words)  # of ablate's own flags
        for place, word in enumerate(words):
            flag = word.partition("=")[0]
            if re.fullmatch(r"--?[a-zA-Z][\w-]*", flag):
                assert flag in (known if place < end else trainer), f"{page}: moco-ext {' '.join(words)}"


def test_every_command_named_in_the_docs_exists():
    for page, words in commands():
        if words and not words[0].startswith(("-", "[", "$")):
            assert words[0] in COMMANDS, f"{page}: moco-ext {' '.join(words)}"


@pytest.mark.parametrize(("page", "block"), blocks("bash"), ids=lambda value: value[:30])
def test_shell_is_well_formed(page, block):
    checked = subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True)
    assert checked.returncode == 0, f"{page}: {checked.stderr}"


def test_manifests_are_well_formed():
    manifests = [yaml.safe_load(block) for _, block in blocks("yaml")]
    job = next(manifest for manifest in manifests if manifest.get("kind") == "PyTorchJob")
    (container,) = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    words = container["command"] + container["args"]
    assert words[0] == "torchrun"
    known = {flag for action in build_parser("pretrain").of_command._actions for flag in action.option_strings}
    flags = [word for word in words[words.index("pretrain") :] if word.startswith("--")]
    assert set(flags) <= known
