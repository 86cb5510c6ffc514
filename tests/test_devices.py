"""One device or many, one process or several: the same run, and nothing lost when one dies.

The devices are virtual ones of the processor; the processes are real, and meet on the loopback
address.
"""

import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, assert_one_line_error, read_history, read_json, tree
from devices import compare, environment, finish, params_sha256, record_layout, start_processes

PROGRAM = str(ROOT / "grpo_mnist.py")
FLAGS = ("--dataset=digits", "--num-epochs=6", "--batch-size=4096", "--num-minibatches=2")
FLAGS += ("--num-iterations=1", "--output-dir=run")


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
        (
            ("--batch-size=1001",),
            "--batch-size 1001 must be a multiple of 8 (devices x --num-minibatches) and",
        ),
        (
            ("--batch-size=1000", "--num-minibatches=2"),
            "--batch-size 1000 must be a multiple of 16 (devices x --num-minibatches) and",
        ),
    ],
)
def test_a_batch_that_cannot_be_divided_is_refused(flags, message, tmp_path):
    done = run_on_devices(8, *flags, "--output-dir=run")
    assert done.returncode == 2
    assert done.stdout == ""
    assert_one_line_error(done.stderr, message)
    assert tree(tmp_path) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-processes=2"], "host:port, with --num-processes and --process-id, or auto"),
        (["--process-id=0"], "host:port, with --num-processes and --process-id, or auto"),
        (["--coordinator-address=127.0.0.1:1"], "with --num-processes and --process-id"),
        (["--coordinator-address=127.0.0.1", "--num-processes=2", "--process-id=0"], "host:port"),
        (["--coordinator-address=auto"], "JAX finds no devices or processes"),
    ],
)
def test_flags_that_do_not_say_enough_are_refused(flags, message):
    done = run_on_devices(1, *flags)
    assert done.returncode == 2
    assert_one_line_error(done.stderr, message)


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
    """The other is told by JAX, and ends; resumed, the run ends as if nothing happened."""
    processes = start_processes([PROGRAM, *FLAGS], 2, tmp_path)
    for line in processes[0].stdout:
        if line.startswith("Epoch 1/"):
            break
    processes[1].send_signal(number)
    (_, errors, status), (_, victims_errors, victims_status) = finish(processes, timeout=110)
    # JAX ends a process itself if it hears of a death before the program does, and says so.
    assert "if another process has ended, see why" in errors or "another task died" in errors
    assert status != 0
    if number == signal.SIGKILL:
        assert (victims_status, victims_errors) == (-number, "")
    else:
        assert victims_status == 128 + number
        assert_one_line_error(victims_errors, f"stopped by {number.name}; resume with: ")
    first, second = finish(start_processes([PROGRAM, "--resume=run"], 2, tmp_path))
    assert first[2] == second[2] == 0
    assert "Resumed: " in first[0]
    assert params_sha256(first[0]) == params_sha256(undisturbed[1])


def test_a_cluster_that_jax_knows_needs_one_flag(tmp_path):
    """Two tasks with the environment that Slurm would give them."""
    short = ("--dataset=digits", "--num-epochs=1", "--batch-size=16384", "--num-iterations=1")
    tasks = []
    for number in range(2):
        slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost"}
        slurm |= {"SLURM_NTASKS": "2", "SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)}
        tasks.append(
            subprocess.Popen(
                [sys.executable, PROGRAM, *short, "--coordinator-address=auto"],
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
    """Each with its own seed."""
    own = [["--seed=1"], ["--seed=2"]]
    for output, errors, status in finish(start_processes([PROGRAM, *FLAGS], 2, tmp_path, 1, own)):
        assert status == 1
        assert "the processes differ in flags, data, versions or checkpoint; " in errors
        assert "Starting" not in output
    assert tree(tmp_path) == []


def test_processes_that_do_not_go_on_from_the_same_checkpoint_are_refused(undisturbed, tmp_path):
    """On hosts that do not share their disks, one may have lost its newest."""
    for name in ("one", "other"):
        shutil.copytree(undisturbed[0] / "run", tmp_path / name)
        (tmp_path / name / "summary.json").unlink()
    (tmp_path / "other" / "checkpoints" / "epoch-6.npz").unlink()
    before = tree(tmp_path)
    own = [["--resume=one"], ["--resume=other"]]
    for output, errors, status in finish(start_processes([PROGRAM], 2, tmp_path, 1, own)):
        assert status == 1
        assert "the processes differ in flags, data, versions or checkpoint; " in errors
        assert "Starting" not in output
    assert tree(tmp_path) == before


def test_without_an_address_a_process_runs_alone():
    """Also where JAX takes the environment for a cluster of more."""
    slurm = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "4"}
    slurm |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    flags = ("--dataset=digits", "--num-epochs=1", "--batch-size=16384")
    done = subprocess.run(
        [sys.executable, PROGRAM, *flags], capture_output=True, text=True, env=environment() | slurm
    )
    assert done.returncode == 0, done.stderr
    assert "Device: 1 x cpu;" in done.stdout
