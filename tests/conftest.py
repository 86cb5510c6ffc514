"""What the tests share: real data where there is some, real processes, nothing of the user's."""

import hashlib
import inspect
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import pytest
import tensorflow_datasets as tfds

import grpo_mnist

ROOT = Path(grpo_mnist.__file__).parent
SHARED_MNIST = ROOT.parent / "shared" / "mnist"
USERS_DATA_DIR = grpo_mnist.Config().data_dir  # before the tests have one of their own
METRICS = {  # what a line of metrics.jsonl holds
    *("epoch", "accuracy", "reward", "test_accuracy", "seconds", "images_per_second", "loss"),
    *("reward_std", "frac_reward_zero_std", "entropy", "kl", "ratio_max", "clip_ratio_low"),
    *("clip_ratio_high", "grad_norm", "learning_rate"),
}


def pytest_configure(config):
    """What one test has compiled, the next ones find, in this process and in those it starts."""
    if hasattr(config, "workerinput"):
        return  # The workers use the cache of the process that started them.
    cache = tempfile.TemporaryDirectory()
    config.add_cleanup(cache.cleanup)
    settings = {
        "jax_compilation_cache_dir": cache.name,
        "jax_compilation_cache_max_size": 2**30,  # With a limit, it has a lock.
        "jax_persistent_cache_min_compile_time_secs": 0.1,  # Each write reads the directory.
    }
    for name, value in settings.items():
        os.environ[name.upper()] = str(value)
        jax.config.update(name, value)


def pytest_xdist_auto_num_workers(config):
    """Two workers for all tests, none for some of them, since a worker takes time to start."""
    return 2 if config.args == config.getini("testpaths") else 0


def pytest_collection_modifyitems(items):
    """The smoke test first."""
    items.sort(key=lambda item: "test_smoke" not in item.nodeid)


@pytest.fixture(autouse=True)
def somewhere_else(tmp_path, monkeypatch):
    """An empty working directory, an empty data directory, and no way to the network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "no-data"))
    set_proxy(monkeypatch, port=1)  # Nobody listens there.


def set_proxy(monkeypatch, port):
    """Sends every request of this process, and of those it starts, to a port of this machine."""
    for name in ("http_proxy", "https_proxy"):  # They go before those in capitals.
        monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


def find_mnist(data_dir):
    """The MNIST files by name, if all are where the program looks for them or beside us, whole."""
    downloads, files = data_dir / "downloads", {}
    for url, info in tfds.builder_cls("mnist").url_infos.items():
        kept = downloads / "mnist" / tfds.core.download.resource.get_dl_fname(url, info.checksum)
        by_hand = (downloads / "manual" / "mnist", downloads / "manual", SHARED_MNIST)
        for path in (*(folder / info.filename for folder in by_hand), kept):
            if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == info.checksum:
                files.setdefault(info.filename, path)
    return files if len(files) == 4 else {}


@pytest.fixture(scope="session")
def mnist_dir(tmp_path_factory):
    """A data directory with copies of the MNIST files where a user would put them."""
    if not (files := find_mnist(USERS_DATA_DIR)):
        pytest.skip(f"needs the MNIST files, in {USERS_DATA_DIR} or in {SHARED_MNIST}")
    manual = tmp_path_factory.mktemp("data") / "downloads" / "manual"
    manual.mkdir(parents=True)
    for name, path in files.items():
        shutil.copyfile(path, manual / name)
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
    return request.getfixturevalue("mnist" if find_mnist(USERS_DATA_DIR) else "digits")


def start_program(*flags, program=ROOT / "grpo_mnist.py", **options):
    """Starts `python grpo_mnist.py flags` as a user would, with its output in pipes."""
    command = [sys.executable, str(program), *map(str, flags)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes, **options)


def run_program(*flags, **options):
    """Runs the program to its end; returns (exit status, standard output, standard error)."""
    with start_program(*flags, **options) as process:
        output, errors = process.communicate(timeout=120)
    return process.returncode, output, errors


def flag(field):
    return "--" + field.replace("_", "-")


def changed(monkeypatch, name, before, after):
    """Replaces a function of the program by its own source, in which a text is another one."""
    function = getattr(grpo_mnist, name)
    source = inspect.getsource(function)
    assert source.count(before) == 1, before
    monkeypatch.setattr(grpo_mnist, name, function)  # which is put back at the end
    exec(source.replace(before, after), vars(grpo_mnist))


def edited_program(path, *edits):
    """Writes a copy of the program to path, in which texts that it has once are other ones."""
    text = (ROOT / "grpo_mnist.py").read_text()
    for before, after in edits:
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    path.write_text(text)


def read_history(run):
    """The metrics of each epoch that a run has written."""
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def read_json(path):
    return json.loads(Path(path).read_text())


def tree(directory):
    """Every file and directory below, to see what a run left behind."""
    return sorted(str(path.relative_to(directory)) for path in Path(directory).rglob("*"))
