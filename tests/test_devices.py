"""One device or many, one process or several: the same run, and nothing lost when one dies.

The devices are virtual ones of the processor; the processes are real, and meet on the loopback
address.
"""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, read_history, read_json, tree
from devices import compare, environment, finish, params_sha256, record_layout, start_processes

from grpo_mnist import Config, UsageError, train

PROGRAM = str(ROOT / "grpo_mnist.py")
FLAGS = ("--dataset=digits", "--num-epochs=6", "--batch-size=4096", "--num-minibatches=2")
FLAGS += ("--num-iterations=1", "--output-dir=run")


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """The same programs in many processes: what one has compiled, the next ones find."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return record_layout((1, 1), 1, 1, "digits", tmp_path_factory.mktemp("no-data"))


@pytest.mark.parametrize("layout", [(8, 1), (2, 2)])
def test_the_first_step_is_the_same_on_any_devices(alone, layout, tmp_path):
    """The answers and the rewards exactly; the parameters as far as float32 sums agree."""
    row = compare(layout, alone, record_layout(layout, 1, 1, "digits", tmp_path), num_seeds=1)
    first_step = row["first_step"]
    assert first_step["actions_equal"]
    assert first_step["rewards_equal"]
    for rounds in ("parameters_after_1_round", "parameters_after_4_rounds"):
        # Where a gradient is 0 but for rounding, Adam's first steps differ.
        assert first_step[rounds]["share_beyond_1e-6_by_seed"][0] < 0.001
        assert first_step[rounds]["largest_by_seed"][0] < 1e-4


def test_actions_that_differ_are_seen(alone):
    """The comparison itself: another run's answers and parameters are not taken for the same."""
    other = alone | {
        "rounds_1_seed_0_actions": (alone["rounds_1_seed_0_actions"] + 1) % 10,
        "rounds_4_seed_0_parameters": alone["rounds_4_seed_0_parameters"] + np.float32(2e-6),
    }
    first_step = compare((1, 1), alone, other, num_seeds=1)["first_step"]
    assert not first_step["actions_equal"]
    assert first_step["rewards_equal"]
    assert first_step["parameters_after_4_rounds"]["share_beyond_1e-6_by_seed"][0] > 0.9


def run_on_devices(num_devices, *flags):
    return subprocess.run(
        [sys.executable, PROGRAM, "--dataset=digits", *flags],
        capture_output=True,
        text=True,
        env=environment(num_devices),
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--batch-size=1001",), "--batch-size 1001 cannot be divided among 8 devices;"),
        (
            ("--batch-size=1000", "--num-minibatches=2"),
            "--batch-size 1000 in 2 minibatches cannot be divided among 8 devices; make it a"
            " multiple of 16",
        ),
    ],
)
def test_a_batch_that_cannot_be_divided_is_refused(flags, message, tmp_path):
    done = run_on_devices(8, *flags, "--output-dir=run")
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert message in line
    assert tree(tmp_path) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--num-processes=2",), "coordinator_address should be defined"),
        (("--process-id=0",), "coordinator_address should be defined"),
        (("--coordinator-address=127.0.0.1:1",), "Number of processes must be defined"),
    ],
)
def test_flags_that_do_not_say_enough_are_refused(flags, message):
    done = run_on_devices(1, *flags)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "--coordinator-address, --num-processes and --process-id belong together" in line
    assert message in line
    assert done.stdout == ""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run of two processes to which nothing happened."""
    directory = tmp_path_factory.mktemp("undisturbed")
    first, second = finish(start_processes([PROGRAM, *FLAGS], 2, directory))
    assert first[2] == second[2] == 0
    return directory, first[0], second[0]


def test_only_the_first_process_prints_and_writes(undisturbed):
    directory, first, second = undisturbed
    assert "Device: 2 x cpu of 2 processes" in first
    assert "--- Training completed! ---" in first
    spoken = [line for line in second.splitlines() if not line.startswith("[Gloo]")]
    assert set(spoken) <= {"Waiting for the other processes..."}
    assert read_json(directory / "run" / "summary.json")["num_epochs"] == 6
    assert len(read_history(directory / "run")) == 6


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["SIGKILL", "SIGINT"])
def test_what_ends_one_process_ends_all_and_costs_nothing(undisturbed, number, tmp_path):
    """The other stops by itself, with a line; resumed, the run ends as if nothing happened."""
    processes = start_processes([PROGRAM, *FLAGS], 2, tmp_path)
    for line in processes[0].stdout:
        if line.startswith("Epoch 1/"):
            break
    processes[1].send_signal(number)
    (_, errors, status), (_, victims_errors, victims_status) = finish(processes, timeout=110)
    if number == signal.SIGKILL:
        # JAX ends a process itself if it hears of a death before the program does, and says so.
        advice = "if another process has ended, see why, and start all again, with --resume"
        assert advice in errors or "another task died" in errors
        assert status != 0
    else:
        assert "stopped by SIGTERM; go on with: " in errors  # as JAX has told it
        assert status == 143
        assert "stopped by SIGINT; so did the others" in victims_errors
        assert victims_status == 130
    first, second = finish(start_processes([PROGRAM, "--resume=run"], 2, tmp_path))
    assert first[2] == second[2] == 0
    assert "Resumed: " in first[0]
    assert params_sha256(first[0]) == params_sha256(undisturbed[1])


def test_a_cluster_that_jax_knows_needs_no_flags(tmp_path):
    """Two tasks with the environment that Slurm would give them."""
    short = ("--dataset=digits", "--num-epochs=1", "--batch-size=16384", "--num-iterations=1")
    tasks = []
    for number in range(2):
        slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost"}
        slurm |= {"SLURM_NTASKS": "2", "SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)}
        tasks.append(
            subprocess.Popen(
                [sys.executable, PROGRAM, *short],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=tmp_path,
                env=environment() | slurm,
            )
        )
    first, second = finish(tasks)
    assert (first[2], second[2]) == (0, 0), first[1] + second[1]
    assert "Device: 2 x cpu of 2 processes" in first[0]
    assert "--- Training completed! ---" in first[0]
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_processes_that_do_not_agree_are_refused(tmp_path):
    """Each with its own seed: the second says so, the first does not wait for it for ever."""
    own = [["--seed=1"], ["--seed=2"]]
    processes = start_processes([PROGRAM, *FLAGS], 2, tmp_path, own_flags=own)
    first, second = finish(processes, timeout=110)
    assert second[2] == 1
    assert "process 1 has other flags, data, versions, program or checkpoint" in second[1]
    assert first[2] != 0
    assert "Epoch 1/" not in first[0]


def test_one_process_of_one_is_a_run_like_any_other(tmp_path):
    """Also where JAX takes the environment for a cluster of more."""
    slurm = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "4"}
    slurm |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    flags = ("--dataset=digits", "--num-epochs=1", "--batch-size=16384", "--num-processes=1")
    done = subprocess.run(
        [sys.executable, PROGRAM, *flags], capture_output=True, text=True, env=environment() | slurm
    )
    assert done.returncode == 0, done.stderr
    assert "Device: 1 x cpu;" in done.stdout


def test_train_does_not_take_a_part_for_the_whole():
    """The flags of several processes, without join_processes: refused, since it would run alone."""
    config = Config(coordinator_address="127.0.0.1:1", num_processes=2, process_id=0)
    with pytest.raises(UsageError, match="--num-processes 2, but JAX knows of 1;"):
        train(config)
