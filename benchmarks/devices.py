"""One device or many, one process or several: that they are the same run, and what a death does.

    python benchmarks/devices.py --data-dir DIR

The devices are virtual: the cores of this machine, by XLA_FLAGS; the processes meet on the loopback
address. Every run is compared with that on one device: the answers and rewards of the first step,
the parameters after it, and, step by step through an epoch of MNIST, how many sampled answers
differ, which a difference in the last bit leads to sooner or later. Then processes are killed, on
the digits: how soon the others stop, what they say, and whether the run, started again with
--resume, ends as one to which nothing happened. Writes results/devices.json.
"""

import argparse
import itertools
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from functools import partial

import jax
import numpy as np
from common import ROOT, grpo_mnist, state_and_step, write_results

PROGRAM = str(ROOT / "grpo_mnist.py")
LAYOUTS = ((2, 1), (8, 1), (2, 2), (4, 4))  # devices in all, processes
STEPS = {1: 1, 4: None}  # how many steps are recorded, by rounds per batch; None: an epoch
RUN = [PROGRAM, "--dataset=digits", "--num-epochs=3", "--output-dir=run"]


def record(flags, num_steps, directory):
    """A process of a run: samples as the step will, then takes it; the first one writes it down."""
    config = grpo_mnist.parse_flags(flags)
    grpo_mnist.start_jax(config)
    dataset = grpo_mnist.load_dataset(config.dataset, config.data_dir)
    state, step = state_and_step(dataset, config)
    everywhere, by_image = grpo_mnist.shardings()

    def answer(of_one_seed):
        state, images, labels = of_one_seed
        key = jax.random.split(state.key)[1]  # as train_step does
        rollout = grpo_mnist.sample_rollout(state, images, labels, key, config)
        return {"actions": rollout.actions, "rewards": rollout.rewards}

    sample = jax.jit(partial(jax.lax.map, answer), out_shardings=everywhere)
    steps = []
    for batch in itertools.islice(grpo_mnist.batches(config, dataset, epoch=1), num_steps):
        shares = [jax.make_array_from_callback(x.shape, by_image, x.__getitem__) for x in batch]
        answers = sample((state, *shares))
        state, metrics = step(state, *batch)
        steps.append(answers | {"accuracy": metrics["accuracy"]})
        if len(steps) == 1:
            leaves = map(np.asarray, jax.tree.leaves(state.networks))
            parameters = np.concatenate([x.reshape(config.num_seeds, -1) for x in leaves], axis=1)
    seen = jax.tree.map(lambda *values: np.stack(values, axis=1), *steps)
    if jax.process_index() == 0:
        np.savez(f"{directory}/{config.num_iterations}.npz", parameters=parameters, **seen)


def environment(devices_each=1):
    flag = f"--xla_force_host_platform_device_count={devices_each}"
    without_proxies = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    return without_proxies | {"XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"}


def start_processes(commands, directory=None, devices_each=1):
    """The processes of one run, with the flags that let them meet, and output to read."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    options = {"cwd": directory, "env": environment(devices_each), "text": True}
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = []
    for number, command in enumerate(commands):
        flags = [f"--coordinator-address={address}", f"--num-processes={len(commands)}"]
        flags = [*flags, f"--process-id={number}"] if len(commands) > 1 else []
        processes.append(subprocess.Popen([sys.executable, *command, *flags], **options))
    return processes


def finish(processes, timeout=150):
    """Waits for them all, and for none longer than that: output, errors and status of each."""
    try:
        return [(*each.communicate(timeout=timeout), each.returncode) for each in processes]
    finally:
        for process in processes:
            process.kill()


def run(command, directory, num_processes, devices_each=1):
    """The output of the first process of a run, which all processes must finish."""
    processes = start_processes([command] * num_processes, directory, devices_each)
    outputs, errors, statuses = zip(*finish(processes, timeout=600), strict=True)
    if any(statuses):
        raise RuntimeError("".join(errors))
    return outputs[0]


def record_layout(num_devices, num_processes, data_dir):
    """What record has written of runs on so many devices, in so many processes, by rounds."""
    with tempfile.TemporaryDirectory() as directory:
        command = [os.path.abspath(__file__), f"--data-dir={data_dir}", "--record=."]
        run(command, directory, num_processes, num_devices // num_processes)
        return {rounds: dict(np.load(f"{directory}/{rounds}.npz")) for rounds in STEPS}


def compare(layout, one, other):
    """A row of the table: what is equal to the runs on one device, and how far the rest is off."""
    first_step = {}
    for name in ("actions", "rewards"):
        pairs = [(one[rounds][name][:, 0], other[rounds][name][:, 0]) for rounds in one]
        first_step[f"{name}_equal"] = all(np.array_equal(*pair) for pair in pairs)
    for rounds in one:
        off = np.abs(one[rounds]["parameters"] - other[rounds]["parameters"]).max(axis=1)
        name = f"parameters_after_{rounds}_round{'s' if rounds > 1 else ''}"
        first_step[name] = {"largest_by_seed": off.tolist()}
    accuracy = other[rounds]["accuracy"] - one[rounds]["accuracy"]  # (seeds, steps)
    flipped = (one[rounds]["actions"] != other[rounds]["actions"]).mean(axis=(2, 3))
    steps = [(np.flatnonzero(of_seed) + 1).tolist() for of_seed in flipped]
    epoch = {
        "difference_by_seed": accuracy.mean(axis=1).tolist(),
        "first_step_with_a_flip_by_seed": [next(iter(of_seed), None) for of_seed in steps],
        "share_of_answers_flipped_by_seed": flipped.mean(axis=1).tolist(),
    }
    row = {"devices": layout[0], "processes": layout[1]}
    return row | {"first_step": first_step, "epoch": epoch}


def params_sha256(output):
    return re.search(r"^params_sha256: (\w+)$", output, re.MULTILINE)[1]


def kill(num_processes, victim, expected):
    """A row of the table of deaths: seconds until the last other process has ended, and how."""
    seconds, others, results = [], [], []
    for _ in range(3):
        with tempfile.TemporaryDirectory() as directory:
            processes = start_processes([RUN] * num_processes, directory)
            next(line for line in processes[0].stdout if line.startswith("Epoch 1/"))
            time.sleep(0.5)
            processes[victim].kill()
            began = time.perf_counter()
            ended = finish(processes)
            seconds.append(time.perf_counter() - began)
            others += ended[:victim] + ended[victim + 1 :]
            results.append(params_sha256(run([PROGRAM, "--resume=run"], directory, num_processes)))
    own_lines = ["grpo_mnist.py: " in errors for _, errors, _ in others]
    return {
        "processes": num_processes,
        "killed": victim,
        "seconds": seconds,
        "others": len(others),
        "others_with_own_line": sum(own_lines),
        "resumed": len(results),
        "same_result": results.count(expected),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=os.path.abspath, required=True)
    parser.add_argument("--record", help=argparse.SUPPRESS)
    options, flags = parser.parse_known_args()
    if options.record:
        flags += ["--dataset=mnist", f"--data-dir={options.data_dir}", "--num-seeds=5"]
        for rounds, num_steps in STEPS.items():
            record([*flags, f"--num-iterations={rounds}"], num_steps, options.record)
        return
    alone = record_layout(1, 1, options.data_dir)
    same = [compare(x, alone, record_layout(*x, options.data_dir)) for x in LAYOUTS]
    killed = []
    for num_processes in (2, 4):
        with tempfile.TemporaryDirectory() as directory:
            expected = params_sha256(run(RUN, directory, num_processes))
        killed += [kill(num_processes, victim, expected) for victim in (num_processes - 1, 0)]
    write_results("devices", {"same": same, "killed": killed})


if __name__ == "__main__":
    main()
