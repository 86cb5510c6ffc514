"""What the tests share: real data where there is some, real processes, nothing of the user's."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import pytest
from common import run_epoch, state_and_step
from hypothesis import settings

import grpo_mnist

settings.register_profile("no deadline", deadline=None)  # a first call compiles
settings.load_profile("no deadline")

ROOT = Path(grpo_mnist.__file__).parent
SHARED_MNIST = ROOT.parent / "shared" / "mnist"
METRICS = {  # what a line of metrics.jsonl holds
    *("epoch", "accuracy", "reward", "test_accuracy", "seconds", "images_per_second", "loss"),
    *("reward_std", "frac_reward_zero_std", "entropy", "kl", "ratio_max", "clip_ratio_low"),
    *("clip_ratio_high", "grad_norm", "learning_rate"),
}
MNIST_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)


def pytest_configure(config):
    """What one test has compiled, the next ones find, in this process and in those it starts."""
    cache = tempfile.TemporaryDirectory()
    config.add_cleanup(cache.cleanup)
    settings = {
        "JAX_COMPILATION_CACHE_DIR": cache.name,
        "JAX_COMPILATION_CACHE_MAX_SIZE": 2**30,  # With a limit, it has a lock.
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": 0,
    }
    for name, value in settings.items():
        os.environ[name] = str(value)
        jax.config.update(name.lower(), value)


def pytest_collection_modifyitems(items):
    """The smoke test first."""
    items.sort(key=lambda item: "test_smoke" not in item.nodeid)


@pytest.fixture(autouse=True)
def somewhere_else(tmp_path, monkeypatch):
    """An empty working directory, an empty data directory, and no way to the network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "no-data"))
    with socket.create_server(("127.0.0.1", 0)) as closed_at_once:
        port = closed_at_once.getsockname()[1]
    set_proxy(monkeypatch, port)


def set_proxy(monkeypatch, port):
    """Sends every request of this process, and of those it starts, to a port of this machine."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
    for name in ("NO_PROXY", "no_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def mnist_dir(tmp_path_factory):
    """A data directory with links to the four MNIST files where a user would put them."""
    if not all((SHARED_MNIST / name).is_file() for name in MNIST_FILES):
        pytest.skip(f"needs the MNIST files in {SHARED_MNIST}")
    manual = tmp_path_factory.mktemp("data") / "downloads" / "manual"
    manual.mkdir(parents=True)
    for name in MNIST_FILES:
        (manual / name).symlink_to(SHARED_MNIST / name)
    return manual.parent.parent


@pytest.fixture(scope="session")
def digits():
    return grpo_mnist.load_dataset("digits", Path("unused"))


@pytest.fixture(scope="session")
def mnist(mnist_dir):
    return grpo_mnist.load_dataset("mnist", mnist_dir)


@pytest.fixture(scope="session")
def dataset(request):
    """Real data of some kind: MNIST where its files are, else digits."""
    return request.getfixturevalue("mnist" if SHARED_MNIST.is_dir() else "digits")


def start_program(*flags, program=ROOT / "grpo_mnist.py", **options):
    """Starts `python grpo_mnist.py flags` as a user would, with its output in pipes."""
    command = [sys.executable, str(program), *map(str, flags)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def run_program(*flags, **options):
    """Runs the program to its end; returns (exit status, standard output, standard error)."""
    with start_program(*flags, **options) as process:
        output, errors = process.communicate(timeout=120)
    return process.returncode, output, errors


def assert_one_line_error(errors, *words):
    """One line on standard error that holds the words, and no traceback."""
    assert len(errors.splitlines()) == 1, errors
    assert errors.startswith("grpo_mnist.py: ")
    assert "Traceback" not in errors
    for word in words:
        assert word in errors


def flag(field):
    """The flag of a field of Config."""
    return "--" + field.replace("_", "-")


def edited_program(path, *edits):
    """Writes a copy of the program to path, in which texts that it has once are other ones."""
    text = (ROOT / "grpo_mnist.py").read_text()
    for before, after in edits:
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    path.write_text(text)
    return path


def read_history(run):
    """The metrics of each epoch that a run has written."""
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def read_json(path):
    return json.loads(Path(path).read_text())


def tree(directory):
    """Every file and directory below, to see what a run left behind."""
    return sorted(str(path.relative_to(directory)) for path in Path(directory).rglob("*"))


def train_in_memory(dataset, config):
    """The main loop's own functions, without the printing and the files."""
    state, step = state_and_step(dataset, config)
    history = []
    for epoch in range(1, config.num_epochs + 1):
        began = time.perf_counter()
        state, step_metrics = run_epoch(step, state, grpo_mnist.batches(config, dataset, epoch))
        history.append(grpo_mnist.end_epoch(config, dataset, state, epoch, began, step_metrics))
    return history
