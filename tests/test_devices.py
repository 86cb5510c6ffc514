"""One device or many, one process or several: the same run, and nothing lost when one dies."""

import os
import signal
import sys

import devices
import numpy as np
import pytest
from conftest import read_json, start_program, tree
from devices import PROGRAM, compare, environment, finish, params_sha256, start_processes
from faults import check_refusal

import grpo_mnist

RUN = "--dataset=digits --num-epochs=6 --batch-size=18432 --num-minibatches=2 --num-iterations=1"
SEVERAL_RUNS = f"""
import runpy, signal, sys
signal.alarm(200)  # However it hangs, it ends.
sys.path.insert(0, {os.path.dirname(devices.__file__)!r})
import devices, grpo_mnist
runs, *flags = sys.argv[1:]
*runs, last = ([*flags, *run.split()] for run in runs.splitlines())
print(*map(grpo_mnist.main, runs), flush=True)
devices.record([*flags, *{RUN.split()}], 1, ".")
sys.argv[1:] = last
runpy.run_path({PROGRAM!r}, run_name="__main__")
"""
DIVISORS = {"--batch-size=1001": 8, "--batch-size=1000 --num-minibatches=2": 16}


def slurm_task(number, num_tasks, num_devices=1):
    """The environment of a task in a job of Slurm's."""
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost"}
    job |= {"SLURM_NTASKS": str(num_tasks), "SLURM_PROCID": str(number)}
    return environment(num_devices) | job | {"SLURM_LOCALID": str(number)}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A first step on one device, on eight, and in two processes; and what these have said."""
    one, eight, two = (tmp_path_factory.mktemp(name) for name in ("one", "eight", "two"))
    task = slurm_task(0, 4, num_devices=8)  # Without an address, it runs alone all the same.
    runs = "\n".join(f"--dataset=digits {flags}" for flags in DIVISORS)
    alone = start_program(SEVERAL_RUNS, runs, program="-c", cwd=eight, env=task)
    devices.record(RUN.split(), 1, one)
    assert grpo_mnist.main([*RUN.split(), f"--output-dir={one / 'run'}"]) == 0
    (one / "run" / "summary.json").unlink()
    commands = []
    for number, history in enumerate(("--output-dir=other", f"--resume={one / 'run'}")):
        runs = f"--coordinator-address=auto\n{RUN} --seed={number}\n{RUN} {history}\n"
        runs += f"{RUN} --output-dir=run\n{RUN} --output-dir=stopped"
        commands.append(["-c", SEVERAL_RUNS, runs])
    processes = start_processes(commands, two)
    statuses = next(line for line in processes[0].stdout if line.startswith("2 "))
    next(line for line in processes[0].stdout if line.startswith("Epoch 1/"))
    processes[1].send_signal(signal.SIGINT)
    return (one, eight, two), finish([alone]), (statuses, *finish(processes, timeout=110))


def test_the_first_step_is_the_same_on_any_devices(recorded):
    """The answers and the rewards exactly; the parameters as far as float32 sums agree."""
    one, *others = (dict(np.load(directory / "1.npz")) for directory in recorded[0])
    for other in others:
        first_step = compare((0, 0), {1: one}, {1: other})["first_step"]
        assert first_step["actions_equal"]
        assert first_step["rewards_equal"]
        off = abs(one["parameters"] - other["parameters"])
        assert (off > 1e-6).mean() < 0.001  # Adam's steps differ where a gradient is 0.
        assert first_step["parameters_after_1_round"]["largest_by_seed"] == [off.max()]
        assert off.max() < 1e-4
    assert one["rewards"].mean() == pytest.approx(one["accuracy"].item())  # of the step itself
    changed = one | {"actions": one["actions"] + 1}
    assert not compare((0, 0), {1: one}, {1: changed})["first_step"]["actions_equal"]


def test_what_cannot_work_is_refused(recorded):
    """A batch that cannot be divided, and processes whose flags or histories differ."""
    (_, eight, two), ((output, errors, status),), (statuses, *ended) = recorded
    assert (output, status) == ("2\n", 2)
    for line, divisor in zip(errors.splitlines(keepends=True), DIVISORS.values(), strict=True):
        word = f"a multiple of {divisor} (devices x --num-minibatches) and at"
        check_refusal((status, output, line), 2, word)
    assert tree(eight) == ["1.npz"]
    assert statuses == "2 1 1 0\n"
    for _, errors, _ in ended:
        unknown, *differing = [x for x in errors.splitlines() if x.startswith("grpo_mnist.py: ")]
        assert "JAX finds no devices or processes" in unknown
        for line in differing[:2]:
            assert "the processes differ in flags, data, versions or checkpoint; " in line
    assert set(os.listdir(two)) == {"1.npz", "run", "stopped"}


def test_what_ends_one_process_ends_all_and_costs_nothing(recorded):
    """The other is told by JAX, and ends; resumed, the run ends as if nothing happened."""
    (_, _, directory), _, (_, survivor, stopped) = recorded
    hint = f"{sys.executable} {PROGRAM} --resume stopped and the flags of several hosts\n"
    assert stopped[1].endswith(f"grpo_mnist.py: stopped by SIGINT; resume with: {hint}")
    assert (stopped[2], bool(survivor[2])) == (128 + signal.SIGINT, True)
    # JAX ends a process itself if it hears of a death before the program does, and says so.
    assert any(x in survivor[1] for x in ("has ended, see why", "another task died"))
    flags = ("--resume=stopped", "--coordinator-address=auto")
    processes = [start_program(*flags, cwd=directory, env=slurm_task(x, 2)) for x in range(2)]
    first, second = finish(processes)
    assert (first[2], second[2]) == (0, 0), first[1] + second[1]
    assert "Device: 2 x cpu of 2 processes" in first[0]
    assert "Resumed: " in first[0]
    spoken = {line for line in second[0].splitlines() if not line.startswith("[Gloo]")}
    assert spoken == {"Waiting for the other processes..."}
    undisturbed = read_json(directory / "run" / "summary.json")
    assert params_sha256(first[0]) == undisturbed["params_sha256"]
    assert tree(directory / "stopped") == tree(directory / "run")
