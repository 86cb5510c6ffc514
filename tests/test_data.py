"""The data: what is read, what is refused, and what happens with a network and without."""

import contextlib
import gzip
import multiprocessing.pool
import shutil
import socketserver
import ssl
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from conftest import ROOT, changed, find_mnist, set_proxy, tree
from faults import check_refusal

import grpo_mnist
from grpo_mnist import Config, DataUnavailable, RunError, load_dataset, main

TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"
TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"
MNIST_FILES = [TEST_IMAGES, TEST_LABELS, TRAIN_IMAGES, TRAIN_LABELS]


@pytest.fixture
def manual(mnist_dir, tmp_path):
    """The folder of the files put there by hand, in a data directory of our own to damage."""
    return shutil.copytree(mnist_dir, tmp_path / "data") / "downloads" / "manual"


# --- What is read ---


def test_mnist_is_mnist(mnist, mnist_dir):
    assert [x.shape for x in mnist[1:]] == [(60_000, 784), (60_000,), (10_000, 784), (10_000,)]
    assert [x.dtype for x in mnist[1:]] == [np.uint8, np.int32] * 2
    # As published: counts of the digits 0 to 9, and the first labels.
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(mnist.train_labels).tolist() == counts
    assert mnist.train_labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert mnist.test_labels[:5].tolist() == [7, 2, 1, 0, 4]
    with gzip.open(mnist_dir / "downloads" / "manual" / TEST_IMAGES) as file:
        assert file.read(16).hex() == "0000080300002710" + "0000001c" * 2
        assert file.read(100 * 784) == mnist.test_images[:100].tobytes()


def test_digits_in_all_their_shifts(digits):
    assert [x.shape for x in digits[1:]] == [(35_925, 784), (35_925,), (360, 784), (360,)]
    assert [x.dtype for x in digits[1:]] == [np.uint8, np.int32] * 2
    assert digits.train_images.max() == 255
    assert np.bincount(digits.test_labels, minlength=10).min() > 30
    shifts = digits.train_images.reshape(25, 1437, 28, 28)
    for shifted, (down, right) in zip(shifts, np.ndindex(5, 5), strict=True):
        inner = shifted[:, down : down + 24, right : right + 24]
        np.testing.assert_array_equal(inner, shifts[12][:, 2:26, 2:26])  # the middle one
        assert shifted.sum() == inner.sum()  # nothing beside it
    assert len({image.tobytes() for image in digits.train_images}) > 35_000
    tests = digits.test_images.reshape(360, 28, 28)
    assert tests.sum() == tests[:, 2:26, 2:26].sum()  # in the middle, too


def test_an_epoch_uses_every_image_at_most_once(dataset):
    """And its batches are full; what is left over changes; the order is that of (seed, epoch)."""
    count = len(dataset.train_images)
    numbered = dataset._replace(train_labels=np.arange(count))
    left_over = []
    for seed, epoch in ((0, 1), (0, 2), (1, 1)):
        chosen = []
        for images, numbers in grpo_mnist.batches(Config(seed=seed), numbered, epoch):
            assert images.shape == (1, 1024, 784)
            np.testing.assert_array_equal(images, dataset.train_images[numbers])
            chosen.extend(numbers[0])
        assert len(chosen) == len(set(chosen)) == count - count % 1024
        left_over.append(frozenset(range(count)) - set(chosen))
    assert len(set(left_over)) == 3


WATCH_IMPORTS = """
import builtins, sys, grpo_mnist
original, seen = builtins.__import__, set()
sys.setprofile(lambda *_: seen.add(builtins.__import__))
grpo_mnist.load_dataset("mnist", sys.argv[1])
sys.setprofile(None)
print(seen == {original})
"""


def test_the_import_of_python_stays_as_it_is_while_data_are_read(mnist_dir):
    """tensorflow-datasets replaces it when it is imported, which may break an import of JAX's."""
    command = [sys.executable, "-c", WATCH_IMPORTS, mnist_dir]
    assert subprocess.check_output(command, cwd=ROOT, text=True) == "True\n"


def test_files_in_the_folder_of_their_data_set_come_first(manual, mnist):
    """Beside them, directly in manual/, may be those of another one. The tests find them, too."""
    (manual / "mnist").mkdir()
    for name in MNIST_FILES:
        (manual / name).rename(manual / "mnist" / name)
        (manual / name).write_text("of another data set")
    data_dir = manual.parent.parent
    assert find_mnist(data_dir) == {name: manual / "mnist" / name for name in MNIST_FILES}
    jax.tree.map(np.testing.assert_array_equal, load_dataset("mnist", data_dir)[1:], mnist[1:])


# --- What is refused ---

FAULTS = {  # what becomes of a file's content
    "truncated": lambda content: content[:-100],
    "a flipped bit": lambda content: bytes([content[0] ^ 1]) + content[1:],
    "other labels": lambda content: gzip.compress(bytes(10_008)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_file_is_named_and_not_trained_on(fault, manual):
    """Nothing else is, either, as if files were only missing, and nothing is changed."""
    (manual / TEST_IMAGES).unlink()
    path = manual / TEST_LABELS
    path.write_bytes(FAULTS[fault](path.read_bytes()))
    before = tree(manual)
    with pytest.raises(RunError) as refused:
        load_dataset("auto", manual.parent.parent)
    words = (f"{path} is ", " bytes, not the right 4,542 (SHA-256 f7ae60f92e00", "; remove it, or")
    assert all(word in str(refused.value) for word in words)
    assert tree(manual) == before


def test_a_missing_file_is_named_unless_digits_will_do(manual, digits, capfd):
    (manual / TEST_IMAGES).unlink()
    before = tree(manual)
    result = main(["--dataset=mnist", "--data-dir=data"]), *capfd.readouterr()
    words = (f"fetch {TEST_IMAGES} from https://", "into data/downloads/manual/mnist")
    check_refusal(result, 1, "mnist cannot be had", *words)
    assert result[1] == ""
    jax.tree.map(np.testing.assert_array_equal, load_dataset("auto", "data")[1:], digits[1:])
    assert tree(manual) == before
    first, second = capfd.readouterr().out.splitlines()
    assert first.startswith("NOTICE: MNIST cannot be had; training on scikit-learn's small digits ")
    assert "--dataset mnist" in second  # which names the files and their place, see above
    assert max(len(first), len(second)) <= 80


# --- What comes from a network ---

FOUND = b"HTTP/1.0 200 OK\r\n\r\n"
DRIPPING = [b"H"] * 99


@pytest.fixture
def serve(monkeypatch):
    """Starts a proxy that sends pieces to one client after the other, with a pause after each."""

    def start(pieces, pause=0.0, tls=None):
        def answer(connection, *_):
            with contextlib.suppress(OSError):
                request = connection.recv(9999)
                if request.startswith(b"CONNECT"):
                    connection.sendall(FOUND)
                    with tls.wrap_socket(connection, server_side=True) as secured:
                        return answer(secured)
                for piece in pieces(request.split()[1].decode()):
                    connection.sendall(piece)
                    ended.wait(pause)

        server = servers.enter_context(socketserver.TCPServer(("127.0.0.1", 0), answer))
        threading.Thread(target=server.serve_forever, args=(0.1,)).start()
        servers.callback(server.shutdown)
        set_proxy(monkeypatch, server.server_address[1])

    monkeypatch.setattr(socketserver.TCPServer, "request_queue_size", 0)
    ended = threading.Event()
    with contextlib.ExitStack() as servers:
        yield start
        ended.set()


def reports(data_dir, limit, number=1):
    """What downloads have to report that begin at the same time and all fail within a limit."""

    def attempt(_):
        try:
            return load_dataset("kmnist", data_dir)
        except DataUnavailable as error:
            return str(error)

    with multiprocessing.pool.ThreadPool(number) as pool:
        found = pool.map_async(attempt, range(number)).get(timeout=limit)
    assert [path for path in data_dir.rglob("*") if path.is_file()] == []
    return found


def test_without_a_network_the_decision_falls_within_10_seconds(serve, tmp_path):
    """One gets an answer byte by byte, one none, and one is not even let in."""
    serve(lambda path: DRIPPING, pause=0.2)
    found = reports(tmp_path, limit=10, number=3)
    for report in found:
        assert report.startswith("kmnist cannot be had: no answer (")
        assert ", ".join(MNIST_FILES) in report
        assert report.endswith(f"into {tmp_path / 'downloads' / 'manual' / 'kmnist'}")
        assert "\n" not in report
    assert {report.split()[6] for report in found} >= {"(ReadTimeout)", "(TimeoutError)"}


SOMETHING_ELSE = {  # what is said of an answer
    "HTTP status 503 and 0 other bytes": b"HTTP/1.0 503 No\r\n\r\n",
    "HTTP status 200 and 14 other bytes": FOUND + b"Please log in!",
    "no answer (ChunkedEncodingError)": b"HTTP/1.0 200 OK\r\nContent-Length: 9\r\n\r\ncut",
}


@pytest.mark.parametrize("words", SOMETHING_ELSE)
def test_a_download_of_something_else_is_quoted_and_not_kept(words, serve, tmp_path):
    serve(lambda path: [SOMETHING_ELSE[words]])
    (report,) = reports(tmp_path, limit=10)
    assert report.startswith(f"kmnist cannot be had: {words} from http://")


@pytest.fixture
def tls(monkeypatch):
    """A certificate for the address of MNIST, and a client that trusts it."""
    if not shutil.which("openssl"):
        pytest.skip("needs openssl to make a certificate for the loopback server")
    command = "openssl req -x509 -newkey rsa:2048 -nodes -keyout tls.pem -out tls.pem"
    names = ("-subj", "/CN=test", "-addext", "subjectAltName=DNS:storage.googleapis.com")
    subprocess.run([*command.split(), *names], check=True, capture_output=True)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "tls.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain("tls.pem")
    return context


def test_mnist_is_downloaded_once_and_kept(mnist, mnist_dir, serve, tls, tmp_path, monkeypatch):
    """The real download code, from tensorflow-datasets to TLS, against a server of this machine."""
    asked = []

    def pieces(path):
        asked.append(path.removeprefix("/cvdf-datasets/mnist/"))
        return FOUND, (mnist_dir / "downloads" / "manual" / asked[-1]).read_bytes()

    serve(pieces, tls=tls)
    jax.tree.map(np.testing.assert_array_equal, load_dataset("mnist", tmp_path)[1:], mnist[1:])
    assert asked == MNIST_FILES
    kept = tmp_path / "downloads" / "mnist"
    assert list(kept.parent.iterdir()) == [kept]
    monkeypatch.setattr("conftest.SHARED_MNIST", tmp_path)
    assert sorted(find_mnist(tmp_path).values()) == sorted(kept.iterdir())  # by the tests, too

    (cached,) = kept.glob("*train-images*.gz")
    cached.write_bytes(b"garbage under the right name")
    with pytest.raises(RunError, match=f"{cached.name} is 28 bytes, not the "):
        load_dataset("mnist", tmp_path)
    cached.unlink()
    asked.clear()
    load_dataset("mnist", tmp_path)
    assert asked == [TRAIN_IMAGES]


def test_a_file_without_end_is_given_up(serve, tmp_path, monkeypatch):
    """The limit of five minutes, shortened here, is kept to."""
    serve(lambda path: [FOUND, *DRIPPING], pause=0.1)
    changed(monkeypatch, "download", "timeout=300", "timeout=0.2")
    assert "no answer (TimeoutError)" in reports(tmp_path, limit=1)[0]


def test_each_safeguard_turns_a_test_red(serve, manual, tmp_path, monkeypatch):
    """Without the limit offline, and without the checksum of a file put there by hand."""
    serve(lambda path: DRIPPING, pause=0.1)
    changed(monkeypatch, "download", "get(timeout=7)", "get()")
    with pytest.raises(multiprocessing.TimeoutError):
        reports(tmp_path / "new", limit=8)
    changed(monkeypatch, "load_idx_files", "raise RunError", "str")
    with pytest.raises(pytest.fail.Exception):
        test_a_damaged_file_is_named_and_not_trained_on("other labels", manual)
