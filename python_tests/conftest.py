"""Shared fixtures: the devices there are, seeds, hypothesis profiles, the slow marker."""

import os
import signal

import hypothesis
import pytest
import torch

# MOCO_EXT_TEST_DEVICES=cuda leaves out the CPU, for `make gpu`.
DEVICES = os.environ.get("MOCO_EXT_TEST_DEVICES", "cpu,cuda" if torch.cuda.is_available() else "cpu").split(",")

# No deadline: a first call loads libraries and starts threads, which says nothing about the op.
hypothesis.settings.register_profile("local", deadline=None, max_examples=60)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=60, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than ten seconds on two cores")
    if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # they share the cores
        torch.set_num_threads(max(1, torch.get_num_threads() // int(workers)))


@pytest.fixture(params=DEVICES, scope="session")
def device(request) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(20)


@pytest.fixture
def exact_convolutions(monkeypatch):
    """For steps that must agree with other steps. By default cuDNN rounds operands to TF32, which has 11 bits, and sums
    the gradient of weights by atomic additions, whose order differs from run to run."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@pytest.fixture
def one_thread():
    """Of such small convolutions one core does as many a second as two, and on a busy machine more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def interruptible():
    """SIGINT raises KeyboardInterrupt, also in a shell's background job, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    from shards_on_disk import write_folder

    return write_folder(tmp_path_factory.mktemp("folder"))


@pytest.fixture(scope="session")
def image_shards(image_folder, tmp_path_factory):
    """The same images in shards of seven."""
    from moco_ext import data
    from moco_ext.data.shard_writer import write_shards

    root = tmp_path_factory.mktemp("shards")
    write_shards(data.load(image_folder), root, images_per_shard=7)
    return root
