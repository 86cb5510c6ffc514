"""What the program says and leaves behind when it is asked wrongly, fails, or is stopped."""

import gc
import itertools
import re
import runpy
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, flag, run_program, set_proxy, start_program, tree
from faults import check_refusal, read_until

from grpo_mnist import Config, UsageError, main, parse_flags

DIGITS = ("--dataset=digits", "--num-epochs=2", "--batch-size=8192")
ENDLESS = ("--num-epochs=1000", "--output-dir=run")

COUNTS = "num-epochs batch-size num-generations num-iterations num-minibatches num-seeds"
OUT_OF_RANGE = {  # what a value must be: flags, and values that are not
    "1 or more, and below 2**31": (COUNTS, "0 -1 2147483648"),
    "above 0, within float32": ("learning-rate clip-epsilon-high", "0.0 -0.1 nan inf 1e-50"),
    "0 or more, within float32": ("beta entropy-coef", "-0.1 nan inf 1e+39"),
    "above 0 and below 1": ("clip-epsilon", "0.0 1.0 nan"),
    "0 or more, the last below 2**32": ("seed", "-1 4294967296"),
}
NOT_UNDERSTOOD = (  # unknown, without a value, mistyped, or not a choice
    "--lr=3 --num-epochs --num-epochs= --num-epochs=1.5 --batch-size=None --seed=0x10 "
    "--learning-rate=1,5 --clip-epsilon-high=auto --dataset=MNIST"
)
WRONG = {  # flags, and what the line on standard error must hold
    "stray": "stray",
    "--ref-sync-epochs=-1": "--ref-sync-epochs -1 must be 0 or more, within float32",
    "--batch-size=1": "--batch-size 1 must be 2 or more: a group of one learns nothing",
    "--baseline=group --num-generations=1": "--num-generations 1 must be 2 or more where ",
    "--scale-rewards=mean": "--baseline batch must be group or none with --scale-rewards mean",
    "--loss-type=cispo": "--clip-epsilon-high None must be given, such as 4, with --loss-type ci",
    "--loss-type=cispo --clip-epsilon-high=4 --clip-epsilon=0.1": "--clip-epsilon 0.1 must be left",
    "--loss-type=dg --clip-epsilon-high=0.3": "--clip-epsilon-high 0.3 must be left out",
    "--loss-type=dg --baseline=group --dynamic-sampling": "--dynamic-sampling True must be off",
    "--loss-type=tpo --baseline=none": "--baseline none must be left out",
    "--loss-type=tpo --baseline=group": "--loss-type tpo must be left out",
    "--loss-type=tpo --num-generations=2": "--num-generations 2 must be 1",
    "--dynamic-sampling": "--dynamic-sampling True must be on only where ",
    "--seed=4294967295 --num-seeds=2": "--seed 4294967295 must be 0 or more",
    "--num-generations=1000 --num-seeds=3000000": "must be below 2**31 / --batch-size / ",
    "--num-iterations=65536 --num-minibatches=32768": "must be below 2**31 / --num-minibatches",
    "--kl-estimator=k3_corrected": "--kl-estimator k3_corrected must be exact while --beta is 0",
    "--ref-sync-epochs=2": "--ref-sync-epochs 2 must be 0 while --beta is 0",
    "--num-processes=2": "--coordinator-address None must be host:port, with --num-processes",
    "--coordinator-address=a --num-processes=2 --process-id=0": "-address a must be host:port",
    "--batch-size=4 --num-minibatches=8": "--batch-size 4 must be a multiple of 8 (",
    "--batch-size=40000": "a multiple of 1 (devices x --num-minibatches) and at most 35925 (train",
    "--output-dir=a-file": "a-file cannot be opened (Not a directory)",
    "--output-dir=a-run": "--output-dir a-run holds a run (metrics.jsonl)",
    "--dataset=mnist --data-dir=a-file": "--data-dir a-file must be a directory",
}
WRONG |= {flags: flags.partition("=")[0] for flags in NOT_UNDERSTOOD.split()}
WRONG |= {
    f"--{name}={value}": f"--{name} {value} must be {rule}"
    for rule, (names, values) in OUT_OF_RANGE.items()
    for name, value in itertools.product(names.split(), values.split())
}


@pytest.mark.parametrize("flags", WRONG)
def test_bad_input_is_refused_in_one_line(flags, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("COLUMNS", "40")  # The parser would break lines.
    Path("a-file").write_text("mine")
    Path("a-run").mkdir()
    Path("a-run/metrics.jsonl").touch()
    before = tree(tmp_path)
    status, output, errors = main([*DIGITS, *flags.split()]), *capfd.readouterr()
    check_refusal((status, output, errors), 2, WRONG[flags])
    assert output == ""
    assert "memory" not in errors  # as it is not the cause
    assert tree(tmp_path) == before
    assert Path("a-file").read_text() == "mine"


@pytest.mark.parametrize("platform", ["cuda", "abacus"])
def test_devices_that_do_not_exist_are_refused_in_one_line(platform, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", platform)
    result = run_program(*DIGITS)
    check_refusal(result, 2, platform)
    assert result[1] == ""
    assert tree(tmp_path) == []


@pytest.mark.parametrize("name", ["dataset", "loss_type", "baseline", "scale_rewards"])
def test_a_config_is_checked_on_construction(name):
    with pytest.raises(UsageError, match=flag(name)):
        Config(**{name: "PPO"})


ANSWERS_PER_IMAGE = {  # They depend on what is compared.
    "--baseline=group": 8,
    "--scale-rewards=group --dynamic-sampling": 8,
    "--baseline=none --scale-rewards=mean": 8,
    "--baseline=group --num-generations=4 --clip-epsilon=0.1": 4,
    "--loss-type=dg --baseline=group --scale-rewards=mean": 8,
    "--loss-type=tpo --baseline=critic": 1,
}


@pytest.mark.parametrize("flags", ANSWERS_PER_IMAGE)
def test_flags_that_go_together(flags):
    assert parse_flags(flags.split()).num_generations == ANSWERS_PER_IMAGE[flags]


def test_directories_may_be_text_and_that_of_data_follows_tensorflow_datasets(monkeypatch):
    assert Config(output_dir="~/runs").output_dir == Path.home() / "runs"
    monkeypatch.setenv("TFDS_DATA_DIR", "of-the-user")
    assert Config().data_dir == Path("of-the-user")
    monkeypatch.delenv("TFDS_DATA_DIR")
    assert Config().data_dir == Path.home() / "tensorflow_datasets"


def test_help_explains_every_flag(capfd):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capfd.readouterr().out
    assert [name for name in Config.__dataclass_fields__ if flag(name) not in text] == []


def test_importing_the_file_does_nothing(tmp_path, capfd):
    before = [*map(signal.getsignal, (signal.SIGINT, signal.SIGTERM)), gc.isenabled()]
    runpy.run_path(ROOT / "grpo_mnist.py")
    assert [*map(signal.getsignal, (signal.SIGINT, signal.SIGTERM)), gc.isenabled()] == before
    assert capfd.readouterr() == ("", "")
    assert tree(tmp_path) == []


# --- What goes wrong on the way ---


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_imports_ends_the_process_as_the_system_does(number):
    """They come after the line, which is there as there are no flags."""
    with start_program() as process:
        line = process.stderr.readline()
        process.send_signal(number)
        output, errors = process.communicate(timeout=20)
    assert (process.returncode, line, output, errors) == (-number, "Loading...\n", "", "")


def run_on_a_terminal(*flags):
    """Runs the program on a terminal: its exit status, and what it has sent to the screen."""
    pytest.importorskip("pty")
    run = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
    command = [sys.executable, "-c", run, sys.executable, ROOT / "grpo_mnist.py", *flags]
    process = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=60)
    return process.returncode, process.stdout.decode()


def test_a_terminal_shows_what_is_waited_for(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    status, screen = run_on_a_terminal(*DIGITS)
    assert status == 0
    waiting = ("Loading...\r", "Starting GRPO", "Compiling", "Training", "0:00:0", "completed!")
    places = [screen.index(words) for words in waiting]
    assert places == sorted(places)
    lines = re.split(r"\r\n|\x1b\[2K", screen)  # The latter clears a line, of the progress bar.
    assert "--- Training completed! ---" in lines
    epochs = [line for line in lines if line.startswith("Epoch ")]
    assert [line.rpartition(" ")[2] for line in epochs] == ["images/s"] * 2  # not broken
    line = "grpo_mnist.py: --num-epochs 0 must be 1 or more, and below 2**31 (see --help)"
    assert run_on_a_terminal("--num-epochs=0") == (2, f"Loading...\r{line}\r\n")


def test_a_signal_while_the_data_are_fetched(tmp_path, monkeypatch):
    """Nothing is there to resume yet."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        set_proxy(monkeypatch, server.getsockname()[1])
        with start_program("--dataset=mnist", *ENDLESS) as process, server.accept()[0]:
            process.send_signal(signal.SIGINT)  # It has asked for a file, and has no answer.
            output, errors = process.communicate(timeout=20)
    assert (process.returncode, output, errors) == (130, "", "grpo_mnist.py: stopped by SIGINT\n")
    assert tree(tmp_path) == []


def test_a_signal_ends_a_run_whose_reader_has_gone():
    """As with `2>&1 | tee log`, where Ctrl-C ends tee as well. Before, the directory is in use."""
    with start_program("--dataset=digits", *ENDLESS) as process:
        read_until(process, "Output: ")
        assert main(["--resume=run"]) == 2
        process.stdout.close()
        process.stderr.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 130


def test_a_reader_that_leaves():
    """`python grpo_mnist.py | head -1` ends without a traceback."""
    with start_program(*DIGITS) as process:
        assert process.stdout.readline().startswith("Starting GRPO")
        process.stdout.close()
        errors = process.stderr.read()
    check_refusal((process.returncode, "", errors), 1, "Broken pipe")


WITHOUT_POSIX = """
import os, sys

def open_no_directory(event, arguments):
    if event == "open" and os.path.isdir(arguments[0]):
        raise PermissionError(13, "Permission denied", arguments[0])

sys.addaudithook(open_no_directory)
# With None, an import raises ImportError.
sys.modules.update(dict.fromkeys(("fcntl", "grp", "pwd", "resource", "termios")))
import grpo_mnist
sys.exit(grpo_mnist.main(sys.argv[1:]))
"""


def test_a_run_without_posix(tmp_path, monkeypatch):
    """As far as Windows can be played: what it lacks is hidden, also from the libraries."""
    # The lock of the tests' compilation cache is another one without fcntl.
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    flags = ("--dataset=digits", "--num-epochs=1", "--batch-size=35925")  # all images in one batch
    place = f"--output-dir={tmp_path}"
    status, output, errors = run_program(WITHOUT_POSIX, *flags, place, program="-c", cwd=ROOT)
    assert (status, errors) == (0, "")
    assert "--- Training completed! ---" in output
    assert (tmp_path / "summary.json").exists()
