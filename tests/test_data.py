"""The data: what is read, what is refused, and what happens with a network and without."""

import contextlib
import gzip
import http.server
import os
import shutil
import socket
import ssl
import subprocess
import threading
import time

import numpy as np
import pytest
from conftest import (
    MNIST_FILES,
    ROOT,
    SHARED_MNIST,
    assert_one_line_error,
    edited_program,
    run_program,
    set_proxy,
    tree,
)

import grpo_mnist
from grpo_mnist import Config, DataUnavailable, load_dataset, main

# --- What is read ---


def test_mnist_is_mnist(mnist):
    assert mnist.train_images.shape == (60_000, 784)
    assert mnist.test_images.shape == (10_000, 784)
    assert mnist.train_images.dtype == mnist.test_images.dtype == np.uint8
    assert mnist.train_labels.dtype == mnist.test_labels.dtype == np.int32
    # As published: counts of the digits 0 to 9, and the first labels.
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(mnist.train_labels).tolist() == counts
    counts = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert np.bincount(mnist.test_labels).tolist() == counts
    assert mnist.train_labels[:5].tolist() == [5, 0, 4, 1, 9]


def test_pixels_against_a_reader_of_bytes(mnist):
    with gzip.open(SHARED_MNIST / "t10k-images-idx3-ubyte.gz") as file:
        assert file.read(16).hex() == "0000080300002710" + "0000001c" * 2
        for image in mnist.test_images[:100]:
            assert file.read(784) == image.tobytes()


def test_digits_in_all_their_shifts(digits):
    assert digits.train_images.shape == (35_925, 784)
    assert digits.test_images.shape == (360, 784)
    assert digits.train_images.dtype == np.uint8
    assert digits.train_images.max() == 255
    assert np.bincount(digits.test_labels, minlength=10).min() > 30
    shifts = digits.train_images.reshape(25, 1437, 28, 28)
    for shifted, (down, right) in zip(shifts, np.ndindex(5, 5), strict=True):
        inner = shifted[:, down : down + 24, right : right + 24]
        np.testing.assert_array_equal(inner, shifts[12][:, 2:26, 2:26])  # the middle one
        assert shifted.sum() == inner.sum()  # nothing beside it, nothing cut off
    assert len(np.unique(digits.train_images, axis=0)) > 35_000


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
import builtins, sys, threading
import grpo_mnist

def watch(*_):
    calls.append(builtins.__import__ is original)

calls, original = [], builtins.__import__
threading.setprofile(watch)  # At every call in threads, of which one reads the data.
status = grpo_mnist.main(sys.argv[1:])
print("as it was:", len(calls) > 1000 and all(calls))
sys.exit(status)
"""


def test_the_import_of_python_stays_as_it_is_while_jax_compiles(mnist_dir, tmp_path):
    """tensorflow-datasets replaces it when it is imported, which may break an import of JAX's."""
    program = tmp_path / "watch_imports.py"
    program.write_text(WATCH_IMPORTS)
    flags = ["--dataset=mnist", f"--data-dir={mnist_dir}", "--num-epochs=1", "--batch-size=8192"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    status, output, errors = run_program(*flags, program=program, env=environment)
    assert (status, errors) == (0, "")
    assert output.splitlines()[-1] == "as it was: True"


# --- What is refused ---

TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, _ = MNIST_FILES


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def swap(path):
    other = path.with_name(TEST_IMAGES)
    path.rename(path.with_name("aside"))
    other.rename(path)
    path.with_name("aside").rename(other)


def put_directory(path):
    path.unlink()
    path.mkdir()


FAULTS = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "cut to its header": lambda path: path.write_bytes(path.read_bytes()[:20]),
    "swapped": swap,
    "a flipped bit": flip_a_bit,
    "HTML": lambda path: path.write_text("<html>403 Forbidden</html>"),
    "not packed": lambda path: path.write_bytes(gzip.decompress(path.read_bytes())),
    "not IDX": lambda path: path.write_bytes(gzip.compress(b"hello")),
    "packed anew": lambda path: path.write_bytes(
        gzip.compress(gzip.decompress(path.read_bytes()), compresslevel=1)
    ),
    "labels as images": lambda path: shutil.copy(path.with_name(TRAIN_LABELS), path),
    "a directory": put_directory,
}


@pytest.fixture
def copied_mnist(mnist_dir, tmp_path):
    """A data directory of our own to damage."""
    data_dir = tmp_path / "data"
    shutil.copytree(mnist_dir, data_dir)
    return data_dir


@pytest.mark.parametrize("dataset_flag", ["mnist", "auto"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_file_is_named_and_not_trained_on(
    fault, dataset_flag, copied_mnist, tmp_path, capfd
):
    manual = copied_mnist / "downloads" / "manual"
    FAULTS[fault](manual / TRAIN_IMAGES)
    before = tree(tmp_path)
    assert main([f"--data-dir={copied_mnist}", f"--dataset={dataset_flag}"]) == 1
    output, errors = capfd.readouterr()
    assert output == ""
    named, expected = {
        True: (TEST_IMAGES, "not the right 1,648,877 (SHA-256 8d422c7b0a1c1c79"),
        False: (TRAIN_IMAGES, "not the right 9,912,422 (SHA-256 440fcabf73cc546f"),
    }[fault == "swapped"]  # test images are read first
    words = (f"{manual / named} is ", " bytes, ", expected, "remove it")
    if fault == "a directory":
        words = (f"Is a directory: '{manual / named}'",)
    assert_one_line_error(errors, *words)
    assert tree(tmp_path) == before


def test_a_damaged_file_is_named_before_a_missing_one(copied_mnist, capfd):
    """Also with auto, which would go on with digits if files were only missing."""
    manual = copied_mnist / "downloads" / "manual"
    (manual / TEST_IMAGES).unlink()
    (manual / TRAIN_IMAGES).write_bytes(b"")
    assert main([f"--data-dir={copied_mnist}"]) == 1
    assert_one_line_error(
        capfd.readouterr().err, f"{manual / TRAIN_IMAGES} is 0 bytes, not the right 9,912,422"
    )


def test_files_that_are_missing_are_named(copied_mnist, tmp_path, capfd):
    manual = copied_mnist / "downloads" / "manual"
    (manual / TEST_IMAGES).unlink()
    before = tree(tmp_path)
    assert main([f"--data-dir={copied_mnist}", "--dataset=mnist"]) == 1
    output, errors = capfd.readouterr()
    assert output == ""
    assert_one_line_error(errors, f"fetch {TEST_IMAGES} from https://", f"into {manual / 'mnist'}")
    assert TRAIN_IMAGES not in errors
    assert tree(tmp_path) == before


def test_files_in_the_folder_of_their_data_set_come_first(copied_mnist, mnist):
    """Beside them, directly in manual/, there may be files of another one."""
    manual = copied_mnist / "downloads" / "manual"
    (manual / "mnist").mkdir()
    for name in MNIST_FILES:
        (manual / name).rename(manual / "mnist" / name)
        (manual / name).write_text("of another data set")
    found = load_dataset("mnist", copied_mnist)
    np.testing.assert_array_equal(found.train_images, mnist.train_images)
    np.testing.assert_array_equal(found.test_labels, mnist.test_labels)


def test_mnist_is_not_taken_for_one_of_its_relatives(copied_mnist, tmp_path, capfd):
    """Their files have the same names."""
    before = tree(tmp_path)
    assert main([f"--data-dir={copied_mnist}", "--dataset=fashion_mnist"]) == 1
    output, errors = capfd.readouterr()
    assert output == ""
    path = copied_mnist / "downloads" / "manual" / TEST_IMAGES
    assert_one_line_error(
        errors, f"{path} is 1,648,877 bytes, not the ", "belong in manual/<dataset>"
    )
    assert tree(tmp_path) == before


# --- Without a network ---


@pytest.fixture
def silent_network(monkeypatch):
    """A server that accepts connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        set_proxy(monkeypatch, server.getsockname()[1])
        yield


@pytest.fixture
def full_network(monkeypatch):
    """A server that swallows packets: its queue is full, so connecting to it never ends."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server:
        address = server.getsockname()
        with socket.create_connection(address), socket.socket() as second:
            second.setblocking(False)
            second.connect_ex(address)
            set_proxy(monkeypatch, address[1])
            yield


@pytest.fixture
def dripping_network(monkeypatch):
    """A server that sends its answer byte by byte, so that no wait for the next one is long."""

    def drip():
        connection, _ = server.accept()
        with connection:
            while not ended.wait(0.5):
                connection.sendall(b"H")

    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        set_proxy(monkeypatch, server.getsockname()[1])
        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        yield
        ended.set()
        thread.join()


NETWORKS = ["refused", "silent_network", "full_network", "dripping_network"]


@pytest.mark.parametrize("network", NETWORKS)
def test_without_a_network_the_decision_falls_within_10_seconds(network, request, tmp_path, capfd):
    if network != "refused":
        request.getfixturevalue(network)
    began = time.monotonic()
    with pytest.raises(DataUnavailable) as unavailable:
        load_dataset("mnist", tmp_path)
    assert time.monotonic() - began < 10
    assert f"into {tmp_path / 'downloads' / 'manual' / 'mnist'}" in str(unavailable.value)
    assert "\n" not in str(unavailable.value)
    assert capfd.readouterr() == ("", "")
    assert tree(tmp_path) == []


def test_auto_goes_on_with_digits_and_says_so(tmp_path, capfd, digits):
    dataset = load_dataset("auto", tmp_path)
    assert dataset.name == "digits"
    np.testing.assert_array_equal(dataset.train_images, digits.train_images)
    first, second = capfd.readouterr().out.splitlines()
    assert first.startswith("NOTICE: MNIST cannot be had; training on ")
    assert first.endswith("digits INSTEAD.")
    assert "--dataset mnist" in second  # which names the files and their place, see below
    assert max(len(first), len(second)) <= 80


def test_an_explicit_mnist_stops(tmp_path, capfd):
    assert main(["--dataset=mnist", "--data-dir=data"]) == 1
    output, errors = capfd.readouterr()
    assert output == ""
    words = ("mnist cannot be had", "data/downloads/manual/mnist", *MNIST_FILES)
    assert_one_line_error(errors, *words)
    assert tree(tmp_path) == []


# --- With a network, as far as one machine goes ---


class Proxy(http.server.BaseHTTPRequestHandler):
    """Plays the internet to whoever has it for a proxy: a status, and files by their names."""

    status = 200
    files = None  # a directory, or else the bytes that stand for every file
    cut = 0  # bytes that are promised and not sent
    pause = 0  # seconds after each byte, if they are to come one by one
    tls = None

    def do_CONNECT(self):
        self.send_response(200)
        self.end_headers()
        with self.tls.wrap_socket(self.connection, server_side=True) as self.connection:
            self.rfile, self.wfile = self.connection.makefile("rb"), self.connection.makefile("wb")
            self.handle_one_request()
        self.close_connection = True

    def do_GET(self):
        name = self.path.rsplit("/", 1)[-1]
        content = (
            (self.files / name).read_bytes() if hasattr(self.files, "joinpath") else self.files
        )
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(content) + self.cut))
        self.end_headers()
        if self.command == "GET":
            size = 1 if self.pause else max(1, len(content))
            with contextlib.suppress(ConnectionError):  # The client has gone.
                for start in range(0, len(content), size):
                    self.wfile.write(content[start : start + size])
                    self.wfile.flush()
                    time.sleep(self.pause)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def internet(monkeypatch):
    """Starts a Proxy with the given attributes; returns the names of what was asked for."""
    servers = []

    def start(**attributes):
        asked = []

        class ThisProxy(Proxy):
            def log_request(self, *_):
                asked.append(f"{self.command} {self.path}")

        for name, value in attributes.items():
            setattr(ThisProxy, name, value)
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), ThisProxy)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        set_proxy(monkeypatch, server.server_port)
        return asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("status", [403, 503])
def test_a_server_that_says_no_is_quoted(status, internet, tmp_path):
    internet(status=status, files=b"")
    began = time.monotonic()
    with pytest.raises(
        DataUnavailable, match=f"HTTP status {status} and 0 other bytes from http://"
    ):
        load_dataset("kmnist", tmp_path)
    assert time.monotonic() - began < 10
    assert tree(tmp_path) == []


@pytest.mark.parametrize("cut", [0, 1000])
def test_a_download_of_something_else_leaves_nothing_behind(cut, internet, tmp_path):
    """A login page in place of the file; a connection that breaks off."""
    internet(files=b"<html>Please log in</html>", cut=cut)
    with pytest.raises(DataUnavailable, match="kmnist cannot be had"):
        load_dataset("kmnist", tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_download_that_does_not_end_is_given_up(internet, tmp_path):
    """The program ends, too. In a copy of it that has less patience."""
    internet(files=bytes(300), pause=0.1)
    program = edited_program(tmp_path / "hasty.py", ("get(timeout=300)", "get(timeout=1)"))
    began = time.monotonic()
    status, output, errors = run_program("--dataset=kmnist", "--data-dir=data", program=program)
    assert time.monotonic() - began < 25  # of 30 that the file would take
    assert (status, output) == (1, "")
    assert_one_line_error(errors, "kmnist cannot be had: no answer (TimeoutError) from http://")
    assert tree(tmp_path) == ["hasty.py"]


@pytest.fixture
def tls(tmp_path_factory, monkeypatch):
    """A certificate for the address of MNIST, and a client that trusts it."""
    if not shutil.which("openssl"):
        pytest.skip("needs openssl to make a certificate for the loopback server")
    directory = tmp_path_factory.mktemp("tls")
    certificate, key = directory / "certificate.pem", directory / "key.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=test -addext"
    names = "subjectAltName=DNS:storage.googleapis.com"
    subprocess.run(
        [*command.split(), names, "-out", certificate, "-keyout", key],
        check=True,
        capture_output=True,
    )
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context


def test_mnist_is_downloaded_once_verified_and_kept(mnist, internet, tls, tmp_path, monkeypatch):
    """The real download code, from tensorflow-datasets to TLS, against a server of this machine."""
    asked = internet(files=SHARED_MNIST, tls=tls)
    dataset = load_dataset("mnist", tmp_path)
    np.testing.assert_array_equal(dataset.train_images, mnist.train_images)
    np.testing.assert_array_equal(dataset.test_labels, mnist.test_labels)
    assert sorted(request for request in asked if request.startswith("GET")) == sorted(
        f"GET /cvdf-datasets/mnist/{name}" for name in MNIST_FILES
    )
    kept = tree(tmp_path / "downloads" / "mnist")
    assert [name.rsplit(".", 1)[-1] for name in kept] == ["gz"] * 4
    assert sorted(path.name for path in (tmp_path / "downloads").iterdir()) == ["mnist"]

    asked.clear()
    load_dataset("mnist", tmp_path)
    assert asked == []

    cached = next((tmp_path / "downloads" / "mnist").glob("*train-images*.gz"))
    cached.write_bytes(b"garbage under the right name")
    with pytest.raises(grpo_mnist.RunError, match=f"{cached.name} is 28 bytes, not the "):
        load_dataset("mnist", tmp_path)
    cached.unlink()
    load_dataset("mnist", tmp_path)
    assert [request.split("/")[-1] for request in asked if "GET" in request] == [TRAIN_IMAGES]
