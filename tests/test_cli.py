"""What the program says and leaves behind when it is asked wrongly, fails, or is stopped."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import (
    ROOT,
    assert_one_line_error,
    flag,
    read_history,
    read_json,
    run_program,
    set_proxy,
    start_program,
    tree,
)
from faults import read_until

from grpo_mnist import Config, UsageError, main, parse_flags

DIGITS = ("--dataset=digits", "--num-epochs=1")

BAD_INPUT = [
    # unknown
    (["--lr", "3"], "--lr"),
    (["--learning-rat", "0.1"], "--learning-rat"),
    (["--num_epoch", "3"], "--num"),
    (["stray"], "stray"),
    (["-x"], "-x"),
    # without a value, or with too many
    (["--num-epochs"], "--num-epochs"),
    (["--dataset"], "--dataset"),
    (["--seed", "1", "2"], "2"),
    # mistyped
    (["--num-epochs", "ten"], "--num-epochs"),
    (["--num-epochs", "1.5"], "--num-epochs"),
    (["--num-epochs", ""], "--num-epochs"),
    (["--batch-size", "1e3"], "--batch-size"),
    (["--batch-size", "None"], "--batch-size"),
    (["--seed", "0x10"], "--seed"),
    (["--learning-rate", "fast"], "--learning-rate"),
    (["--learning-rate", "1,5"], "--learning-rate"),
    (["--clip-epsilon-high", "auto"], "--clip-epsilon-high"),
    # not a choice
    (["--dataset", "imagenet"], "--dataset"),
    (["--dataset", "MNIST"], "--dataset"),
    (["--lr-schedule", "linear"], "--lr-schedule"),
    (["--baseline", "mean"], "--baseline"),
    (["--dynamic-sampling", "yes"], "yes"),
    (["--scale-rewards", "std"], "--scale-rewards"),
    (["--kl-estimator", "k2"], "--kl-estimator"),
    (["--loss-type", "ppo"], "--loss-type"),
    # not finite
    (["--learning-rate", "nan"], "--learning-rate"),
    (["--learning-rate", "inf"], "--learning-rate"),
    (["--learning-rate", "1e39"], "--learning-rate 1e+39 must be above 0, within float32"),
    (["--learning-rate", "1e-50"], "--learning-rate 1e-50 must be above 0"),
    (["--clip-epsilon", "nan"], "--clip-epsilon"),
    (["--clip-epsilon-high", "inf"], "--clip-epsilon-high"),
    (["--entropy-coef", "-inf"], "--entropy-coef"),
    (["--beta", "nan"], "--beta"),
    # out of range
    (["--num-epochs", "0"], "--num-epochs 0 must be 1 or more"),
    (["--num-epochs=-1"], "--num-epochs -1"),
    (["--batch-size", "0"], "--batch-size 0"),
    (["--num-generations", "0"], "--num-generations 0"),
    (["--num-iterations", "0"], "--num-iterations 0"),
    (["--num-seeds", "0"], "--num-seeds 0"),
    (["--num-minibatches", "0"], "--num-minibatches 0"),
    (["--learning-rate", "0"], "--learning-rate 0.0 must be above 0"),
    (["--learning-rate=-0.1"], "--learning-rate -0.1"),
    (["--clip-epsilon", "0"], "--clip-epsilon 0.0"),
    (["--clip-epsilon", "1"], "--clip-epsilon 1.0"),
    (["--clip-epsilon-high", "0"], "--clip-epsilon-high 0.0"),
    (["--entropy-coef=-1"], "--entropy-coef -1.0"),
    (["--beta=-0.1"], "--beta -0.1"),
    (["--ref-sync-epochs=-1"], "--ref-sync-epochs -1"),
    (["--seed=-1"], "--seed -1"),
    (["--seed=4294967296"], "--seed 4294967296"),
    # not together
    (["--batch-size=100", "--num-minibatches=3"], "--batch-size 100"),
    (
        ["--batch-size=4", "--num-minibatches=8"],
        "--batch-size 4 must be a multiple of 8 (",
    ),
    (["--batch-size=1"], "--batch-size 1 must be 2 or more: a group of one learns nothing"),
    (["--baseline=group", "--num-generations=1"], "--num-generations 1 must be 2 or more where "),
    (["--baseline=loo", "--num-generations=1"], "--num-generations 1 must be 2 or more where "),
    (["--scale-rewards=group", "--num-generations=1"], "--num-generations 1 must be 2 or more"),
    (["--scale-rewards=mean"], "--baseline batch must be group or none"),
    (["--scale-rewards=mean", "--baseline=loo"], "--baseline loo must be group or none"),
    (["--scale-rewards=mean", "--baseline=ema"], "--baseline ema must be group or none"),
    (["--scale-rewards=mean", "--baseline=critic"], "--baseline critic must be group or none"),
    (["--scale-rewards=mean", "--baseline=none", "--num-generations=1"], "--num-generations 1"),
    (
        ["--loss-type=cispo"],
        "--clip-epsilon-high None must be given, such as 4, with --loss-type cispo",
    ),
    (["--loss-type=cispo", "--clip-epsilon-high=4", "--clip-epsilon=0.1"], "--clip-epsilon 0.1 "),
    (["--loss-type=dg", "--clip-epsilon=0.1"], "--clip-epsilon 0.1 must be left out"),
    (["--loss-type=dg", "--clip-epsilon-high=0.3"], "--clip-epsilon-high 0.3 must be left out"),
    (["--loss-type=tpo", "--clip-epsilon=0.1"], "--clip-epsilon 0.1 must be left out"),
    (["--loss-type=tpo", "--clip-epsilon-high=0.3"], "--clip-epsilon-high 0.3 must be left out"),
    (["--loss-type=tpo", "--baseline=none"], "--baseline none must be left out"),
    (["--loss-type=tpo", "--baseline=group"], "--loss-type tpo must be left out"),
    (["--loss-type=tpo", "--scale-rewards=group"], "--loss-type tpo must be left out"),
    (["--loss-type=tpo", "--num-generations=2"], "--num-generations 2 must be 1"),
    (["--loss-type=tpo", "--dynamic-sampling"], "--dynamic-sampling True must be on only where "),
    (["--dynamic-sampling"], "--dynamic-sampling True must be on only where "),
    (["--seed=4294967295", "--num-seeds=2"], "--seed 4294967295"),
    (
        ["--num-generations=1000", "--num-seeds=3000000"],
        "must be below 2**31 / --batch-size / ",
    ),
    (["--num-iterations=1000000000000"], "--num-iterations 1000000000000 must be 1 or more, and"),
    (["--kl-estimator=k3"], "--kl-estimator k3 must be exact while --beta is 0"),
    (["--kl-estimator=k3_corrected"], "--kl-estimator k3_corrected must be exact while --beta is"),
    (["--ref-sync-epochs=2"], "--ref-sync-epochs 2 must be 0 while --beta is 0"),
    (["--num-processes=2"], "--coordinator-address None must be host:port, with "),
    (["--coordinator-address=here:1"], "--coordinator-address here:1 must be host:port, with "),
    (
        ["--batch-size=40000"],
        "--batch-size 40000 must be a multiple of 1 (devices x --num-minibatches)"
        " and at most 35925 (training images)",
    ),
    (["--num-generations=3000000000"], "--num-generations 3000000000"),
    # directories
    (["--output-dir=a-file"], "a-file cannot be opened (Not a directory)"),
    (["--output-dir=a-file/below"], "a-file/below cannot be opened (Not a directory)"),
    (["--output-dir=old-run"], "--output-dir old-run holds a run"),
    (["--output-dir=half-run"], "--output-dir half-run holds a run"),
    (["--output-dir=/proc/run"], "/proc/run cannot be opened (No such file or directory)"),
    (["--dataset=mnist", "--data-dir=a-file"], "--data-dir a-file must be a directory"),
]


@pytest.mark.parametrize(("flags", "words"), BAD_INPUT, ids=[" ".join(f) for f, _ in BAD_INPUT])
def test_bad_input_is_refused_in_one_line(flags, words, tmp_path, capfd):
    (tmp_path / "a-file").write_text("mine")
    (tmp_path / "old-run").mkdir()
    (tmp_path / "old-run" / "config.json").write_text("{}")
    (tmp_path / "half-run").mkdir()
    (tmp_path / "half-run" / "metrics.jsonl").write_text("")
    before = tree(tmp_path)
    assert main([*DIGITS, *flags]) == 2
    output, errors = capfd.readouterr()
    assert output == ""
    assert_one_line_error(errors, words)
    assert tree(tmp_path) == before
    assert (tmp_path / "a-file").read_text() == "mine"


@pytest.mark.parametrize(
    ("flags", "environment"),
    [
        (["--num-epochs=0"], {}),
        (["--unknown"], {"COLUMNS": "40"}),
        (["--dataset=digits"], {"JAX_PLATFORMS": "cuda"}),
        (["--dataset=digits"], {"JAX_PLATFORMS": "abacus"}),
    ],
)
def test_bad_input_to_the_real_program(flags, environment, tmp_path):
    status, output, errors = run_program(*flags, env=os.environ | environment)
    assert (status, output) == (2, "")
    assert_one_line_error(errors, *environment.get("JAX_PLATFORMS", "").split())
    assert tree(tmp_path) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_epochs": 0},
        {"learning_rate": float("inf")},
        {"baseline": "mean"},
        {"baseline": None},
        {"dataset": "MNIST"},
        {"clip_epsilon_high": -0.3},
        {"loss_type": "ppo"},
    ],
    ids=str,
)
def test_a_config_is_checked_on_construction(wrong):
    (name,) = wrong
    with pytest.raises(UsageError, match=flag(name)):
        Config(**wrong)


def test_a_config_takes_what_python_would():
    config = Config(learning_rate=1, output_dir="~/runs")
    assert config.output_dir.name == "runs"
    assert config.output_dir.is_absolute()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 1),
        ({"baseline": "critic"}, 1),
        ({"baseline": "group"}, 8),
        ({"baseline": "loo", "scale_rewards": "none"}, 8),
        ({"scale_rewards": "group"}, 8),
        ({"baseline": "group", "num_generations": 4}, 4),
        ({"num_generations": 4}, 4),
        ({"baseline": "none", "scale_rewards": "mean"}, 8),
        ({"loss_type": "tpo", "scale_rewards": "none"}, 1),
    ],
    ids=str,
)
def test_the_answers_per_image_depend_on_what_is_compared(fields, expected):
    assert Config(**fields).num_generations == expected


@pytest.mark.parametrize(
    "flags",
    [
        {"baseline": "group", "scale_rewards": "mean", "dynamic_sampling": True},
        {"loss_type": "ppo_clip", "clip_epsilon": 0.1},
        {"loss_type": "cispo", "clip_epsilon_high": 4.0},
        {"loss_type": "cispo", "clip_epsilon_high": 4.0, "baseline": "none", "num_generations": 2},
        {"loss_type": "dg", "baseline": "group", "scale_rewards": "mean"},
        {"loss_type": "tpo", "baseline": "critic", "num_iterations": 2},
        {"loss_type": "tpo", "baseline": "ema", "num_minibatches": 2, "num_seeds": 2},
        {"kl_estimator": "k3_corrected", "beta": 0.1, "ref_sync_epochs": 1},
    ],
    ids=lambda flags: " ".join(map(str, flags.values())),
)
def test_flags_that_go_together(flags):
    given = {name: value for name, value in flags.items() if value is not True}
    switches = [flag(name) for name in flags.keys() - given.keys()]
    config = parse_flags([*switches, *(f"{flag(name)}={given[name]}" for name in given)])
    assert config == Config(**flags)
    assert flags.items() <= vars(config).items()


def test_data_dir_follows_tensorflow_datasets(monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert Config().data_dir == tmp_path
    monkeypatch.delenv("TFDS_DATA_DIR")
    assert Config().data_dir.parts[-1] == "tensorflow_datasets"
    assert Config().data_dir.is_absolute()


def test_help_explains_every_flag(capfd):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capfd.readouterr().out
    for name in Config.__dataclass_fields__:
        assert flag(name) in text


def test_importing_the_file_does_nothing(tmp_path):
    code = "import grpo_mnist, signal; print(signal.getsignal(signal.SIGTERM), end='')"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "0", "")
    assert tree(tmp_path) == []


# --- What goes wrong on the way ---


def test_numbers_that_run_away_stop_the_run(tmp_path, capfd):
    """A learning rate that no float32 survives: the epoch and the quantity are named."""
    assert main([*DIGITS, "--batch-size=8192", "--learning-rate=1e38", "--output-dir=run"]) == 1
    output, errors = capfd.readouterr()
    assert "completed" not in output
    assert_one_line_error(errors, "epoch 1, seed 0: not finite: ", "actor.", "--learning-rate")
    assert tree(tmp_path) == ["run", "run/.lock", "run/checkpoints", "run/config.json"]


ENDLESS = ("--num-epochs=1000", "--output-dir=run")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_imports_ends_the_process_as_the_system_does(number, tmp_path):
    with start_program("--dataset=digits", *ENDLESS) as process:
        time.sleep(0.7)
        process.send_signal(number)
        output, errors = process.communicate(timeout=20)
    assert (process.returncode, output, errors) == (-number, "", "")
    assert tree(tmp_path) == []


def test_without_flags_a_line_comes_before_the_imports(tmp_path):
    """That the imports go on is seen from the signal, which ends the process as the system does."""
    with start_program() as process:
        line = process.stderr.readline()
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=20)
    assert (process.returncode, line, output, errors) == (-signal.SIGINT, "Loading...\n", "", "")


def run_on_a_terminal(*flags):
    """Runs the program on a terminal: its exit status, and what it has sent to the screen."""
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    command = [sys.executable, str(ROOT / "grpo_mnist.py"), *flags]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        screen = b""
        with contextlib.suppress(OSError):  # which is how Linux says that nobody writes any more
            while received := os.read(ours, 4096):
                screen += received
    os.close(ours)
    return process.returncode, screen.decode()


def test_a_terminal_shows_what_is_waited_for():
    status, screen = run_on_a_terminal("--dataset=digits", "--num-epochs=1", "--batch-size=8192")
    assert status == 0
    waiting = ("Loading...\r", "Starting GRPO", "Compiling", "Training", "Epoch 1/1", "completed!")
    places = [screen.index(words) for words in waiting]
    assert places == sorted(places)


def test_a_wrong_flag_is_one_line_on_a_terminal_too():
    status, screen = run_on_a_terminal("--num-epochs=0")
    loading, line, rest = screen.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    assert (status, loading, rest) == (2, "Loading...", "")
    assert line.startswith("grpo_mnist.py: --num-epochs 0 must be")  # printed over the other one


def test_a_signal_while_the_data_are_fetched(tmp_path, monkeypatch):
    """Nothing is there to resume yet."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        set_proxy(monkeypatch, server.getsockname()[1])
        with start_program("--dataset=mnist", *ENDLESS) as process:
            server.accept()  # The program asks for a file, and will have no answer.
            process.send_signal(signal.SIGTERM)
            output, errors = process.communicate(timeout=20)
    assert (process.returncode, output) == (143, "")
    assert errors == "grpo_mnist.py: stopped by SIGTERM\n"
    assert tree(tmp_path) == []


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_a_run_says_how_to_resume(number, status):
    """As soon as its directory is there, while the step is compiled."""
    with start_program("--dataset=digits", *ENDLESS) as process:
        read_until(process, "Output: ")
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == status
    command = f"{sys.executable} {ROOT / 'grpo_mnist.py'} --resume run"
    assert errors == f"grpo_mnist.py: stopped by {number.name}; resume with: {command}\n"
    assert tree("run/checkpoints") == []


def test_a_signal_ends_a_run_whose_reader_has_gone():
    """As with `2>&1 | tee log`, where Ctrl-C ends tee as well."""
    with start_program("--dataset=digits", *ENDLESS) as process:
        read_until(process, "Output: ")
        process.stdout.close()
        process.stderr.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 130


def test_two_runs_at_once_do_not_share_a_directory():
    flags = ("--dataset=digits", "--num-epochs=1", "--batch-size=8192", "--output-dir=run")
    processes = [start_program(*flags) for _ in range(2)]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert sorted(process.returncode for process in processes) == [0, 2]
    # Which refusal it is depends on how far the other one has come.
    assert_one_line_error("".join(errors), "run ")
    assert len(read_history("run")) == 1


def test_a_reader_that_leaves(tmp_path):
    """`python grpo_mnist.py | head -1` ends without a traceback."""
    with start_program("--dataset=digits", "--num-epochs=1000") as process:
        assert process.stdout.readline().startswith("Starting GRPO")
        process.stdout.close()
        began = time.monotonic()
        errors = process.stderr.read()
        process.wait(timeout=30)
    assert time.monotonic() - began < 30
    assert process.returncode == 1
    assert_one_line_error(errors, "Broken pipe")


WITHOUT_POSIX = """
import os, sys

for name in ("fcntl", "grp", "pwd", "resource", "termios"):
    sys.modules[name] = None  # An import of it raises ImportError.
open_file = os.open

def open_no_directory(path, *arguments, **options):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)
    return open_file(path, *arguments, **options)

os.open = open_no_directory
import grpo_mnist
sys.exit(grpo_mnist.main(sys.argv[1:]))
"""


def test_a_run_without_posix(tmp_path):
    """As far as Windows can be played: what it lacks is hidden, also from the libraries."""
    program = tmp_path / "without_posix.py"
    program.write_text(WITHOUT_POSIX)
    flags = ("--dataset=digits", "--num-epochs=2", "--batch-size=8192", "--output-dir=run")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    status, output, errors = run_program(*flags, program=program, env=environment)
    assert (status, errors) == (0, "")
    assert "--- Training completed! ---" in output
    assert len(read_history("run")) == read_json("run/summary.json")["num_epochs"] == 2
