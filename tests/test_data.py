"""The data: what is read, what is refused, and what happens with a network and without."""

import contextlib
import gzip
import multiprocessing.pool
import runpy
import shutil
import socketserver
import ssl
import subprocess
import sys
import threading

import numpy as np
import pytest
from conftest import ROOT, assert_one_line_error, changed, find_mnist, set_proxy, tree

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
    shapes = [(60_000, 784), (60_000,), (10_000, 784), (10_000,)]
    assert [array.shape for array in mnist[1:]] == shapes
    assert [array.dtype for array in mnist[1:]] == [np.uint8, np.int32] * 2
    # As published: counts of the digits 0 to 9, and the first labels.
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(mnist.train_labels).tolist() == counts
    counts = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert np.bincount(mnist.test_labels).tolist() == counts
    assert mnist.train_labels[:5].tolist() == [5, 0, 4, 1, 9]
    with gzip.open(mnist_dir / "downloads" / "manual" / TEST_IMAGES) as file:
        assert file.read(16).hex() == "0000080300002710" + "0000001c" * 2
        assert file.read(100 * 784) == mnist.test_images[:100].tobytes()


def test_digits_in_all_their_shifts(digits):
    shapes = [(35_925, 784), (35_925,), (360, 784), (360,)]
    assert [array.shape for array in digits[1:]] == shapes
    assert [array.dtype for array in digits[1:]] == [np.uint8, np.int32] * 2
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
    # Beside others, a seed has the order that it has alone.
    beside = [numbers[1] for _, numbers in grpo_mnist.batches(Config(num_seeds=3), numbered, 1)]
    np.testing.assert_array_equal(np.concatenate(beside), chosen)


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


def test_files_in_the_folder_of_their_data_set_come_first(manual, mnist, monkeypatch):
    """Beside them, directly in manual/, may be those of another one. The tests find them, too."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(manual.parent.parent))
    monkeypatch.setattr("conftest.SHARED_MNIST", manual / "none")
    data_dir = runpy.run_path(ROOT / "tests" / "conftest.py")["USERS_DATA_DIR"]
    assert find_mnist(data_dir) == {name: manual / name for name in MNIST_FILES}
    (manual / "mnist").mkdir()
    for name in MNIST_FILES:
        (manual / name).rename(manual / "mnist" / name)
        (manual / name).write_text("of another data set")
    assert find_mnist(data_dir) == {name: manual / "mnist" / name for name in MNIST_FILES}
    dataset = load_dataset("mnist", data_dir)
    np.testing.assert_array_equal(dataset.train_images, mnist.train_images)
    np.testing.assert_array_equal(dataset.test_labels, mnist.test_labels)


# --- What is refused ---

FAULTS = {  # what becomes of a file's content
    "truncated": lambda content: content[:-100],
    "a flipped bit": lambda content: bytes([content[0] ^ 1]) + content[1:],
    "not packed": gzip.decompress,
    "other labels": lambda content: gzip.compress(bytes(10_008)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_file_is_named_and_not_trained_on(fault, manual):
    """And nothing else is trained on instead, and nothing is changed."""
    path = manual / TEST_LABELS
    path.write_bytes(FAULTS[fault](path.read_bytes()))
    before = tree(manual)
    with pytest.raises(RunError) as refused:
        load_dataset("auto", manual.parent.parent)
    words = (f"{path} is ", " bytes, not the right 4,542 (SHA-256 f7ae60f92e00", "; remove it, or")
    assert all(word in str(refused.value) for word in words)
    assert tree(manual) == before


def test_a_missing_file_is_named_and_before_it_a_damaged_one(manual, capfd):
    """The latter also with auto, which would go on with digits if files were only missing."""
    (manual / TEST_IMAGES).unlink()
    before = tree(manual)
    source, target = f"fetch {TEST_IMAGES} from https://", "into data/downloads/manual/mnist"
    damaged = f"data/downloads/manual/{TRAIN_IMAGES} is 0 bytes, not the right 9,912,422 "
    for name, words in (("mnist", ("mnist cannot be had", source, target)), ("auto", [damaged])):
        assert main([f"--dataset={name}", "--data-dir=data"]) == 1
        output, errors = capfd.readouterr()
        assert output == ""
        assert_one_line_error(errors, *words)
        assert tree(manual) == before
        (manual / TRAIN_IMAGES).write_bytes(b"")


def test_auto_goes_on_with_digits_and_says_so(tmp_path, capfd, digits):
    dataset = load_dataset("auto", tmp_path)
    assert dataset.name == "digits"
    np.testing.assert_array_equal(dataset.train_images, digits.train_images)
    first, second = capfd.readouterr().out.splitlines()
    assert first.startswith("NOTICE: MNIST cannot be had; training on ")
    assert first.endswith("digits INSTEAD.")
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


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ("HTTP status 503 and 0 other bytes", b"HTTP/1.0 503 No\r\n\r\n"),
        ("HTTP status 200 and 14 other bytes", FOUND + b"Please log in!"),
        ("no answer (ChunkedEncodingError)", b"HTTP/1.0 200 OK\r\nContent-Length: 9\r\n\r\ncut"),
    ],
)
def test_a_download_of_something_else_is_quoted_and_not_kept(words, answer, serve, tmp_path):
    serve(lambda path: [answer])
    (report,) = reports(tmp_path, limit=10)
    assert report.startswith(f"kmnist cannot be had: {words} from http://")


@pytest.fixture
def tls(tmp_path_factory, monkeypatch):
    """A certificate for the address of MNIST, and a client that trusts it."""
    if not shutil.which("openssl"):
        pytest.skip("needs openssl to make a certificate for the loopback server")
    certificate = tmp_path_factory.mktemp("tls") / "certificate.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=test -addext"
    names = "subjectAltName=DNS:storage.googleapis.com"
    files = ("-out", certificate, "-keyout", certificate.with_name("key.pem"))
    subprocess.run([*command.split(), names, *files], check=True, capture_output=True)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*files[1::2])
    return context


def test_mnist_is_downloaded_once_verified_and_kept(
    mnist, mnist_dir, serve, tls, tmp_path, monkeypatch
):
    """The real download code, from tensorflow-datasets to TLS, against a server of this machine."""
    asked = []

    def pieces(path):
        asked.append(path.removeprefix("/cvdf-datasets/mnist/"))
        return FOUND, (mnist_dir / "downloads" / "manual" / asked[-1]).read_bytes()

    serve(pieces, tls=tls)
    dataset = load_dataset("mnist", tmp_path)
    np.testing.assert_array_equal(dataset.train_images, mnist.train_images)
    np.testing.assert_array_equal(dataset.test_labels, mnist.test_labels)
    assert asked == MNIST_FILES
    kept = tmp_path / "downloads" / "mnist"
    assert list(kept.parent.iterdir()) == [kept]
    assert [path.suffix for path in kept.iterdir()] == [".gz"] * 4
    monkeypatch.setattr("conftest.SHARED_MNIST", tmp_path)
    assert sorted(find_mnist(tmp_path).values()) == sorted(kept.iterdir())  # by the tests, too

    (cached,) = kept.glob("*train-images*.gz")
    cached.write_bytes(b"garbage under the right name")
    assert find_mnist(tmp_path) == {}
    with pytest.raises(RunError, match=f"{cached.name} is 28 bytes, not the "):
        load_dataset("mnist", tmp_path)
    cached.unlink()
    asked.clear()
    load_dataset("mnist", tmp_path)
    assert asked == [TRAIN_IMAGES]


@pytest.mark.parametrize("limit", ["timeout=7", "timeout=300"])
def test_the_safeguards_against_a_slow_network(limit, serve, tmp_path, monkeypatch):
    """The limit of each part of a download, shortened here, is kept to."""
    serve(lambda path: DRIPPING if limit == "timeout=7" else [FOUND, *DRIPPING], pause=0.1)
    changed(monkeypatch, "download", limit, "timeout=0.2")
    assert "no answer (TimeoutError)" in reports(tmp_path, limit=1)[0]
