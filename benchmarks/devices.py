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
from functools import cache, partial
from pathlib import Path

import jax
import numpy as np
from common import ROOT, grpo_mnist, state_and_step, write_results

PROGRAM = str(ROOT / "grpo_mnist.py")
LAYOUTS = ((2, 1), (8, 1), (2, 2), (4, 4))  # devices in all, processes
VICTIMS = ((2, 1), (2, 0), (4, 3), (4, 0))  # processes, the one that is killed
STEPS = {1: 1, 4: None}  # how many steps are recorded, by rounds per batch; None: an epoch
FLAGS = ("--dataset=digits", "--num-epochs=3", "--output-dir=run")


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
        steps.append(sample((state, *shares)))
        state, metrics = step(state, *batch)
        steps[-1]["accuracy"] = metrics["accuracy"]
        if len(steps) == 1:
            leaves = map(np.asarray, jax.tree.leaves(state.networks))
            parameters = np.concatenate([x.reshape(config.num_seeds, -1) for x in leaves], axis=1)
    seen = jax.tree.map(lambda *values: np.stack(values, axis=1), *steps)
    if jax.process_index() == 0:
        np.savez(Path(directory) / f"{config.num_iterations}.npz", parameters=parameters, **seen)


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
        spoken = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(*each, process.returncode) for each, process in zip(spoken, processes, strict=True)]


def record_layout(layout, data_dir):
    """What record has written of runs on so many devices, in so many processes, by rounds."""
    num_devices, num_processes = layout
    with tempfile.TemporaryDirectory() as directory:
        command = [__file__, f"--data-dir={data_dir}", f"--record={directory}"]
        each = num_devices // num_processes
        processes = start_processes([command] * num_processes, devices_each=each)
        for _, errors, status in finish(processes, timeout=600):
            if status:
                raise RuntimeError(errors)
        return {rounds: dict(np.load(Path(directory) / f"{rounds}.npz")) for rounds in STEPS}


def compare(layout, one, other):
    """A row of the table: what is equal to the runs on one device, and how far the rest is off."""
    first_step = {}
    for name in ("actions", "rewards"):
        pairs = [(one[rounds][name][:, 0], other[rounds][name][:, 0]) for rounds in one]
        first_step[f"{name}_equal"] = all(bool((here == there).all()) for here, there in pairs)
    for rounds in one:
        off = np.abs(one[rounds]["parameters"] - other[rounds]["parameters"]).max(axis=1)
        name = f"parameters_after_{rounds}_round{'s' if rounds > 1 else ''}"
        first_step[name] = {"largest_by_seed": off.tolist()}
    flipped = (one[rounds]["actions"] != other[rounds]["actions"]).mean(axis=(2, 3))
    steps = [np.flatnonzero(of_seed) + 1 for of_seed in flipped]
    accuracy = other[rounds]["accuracy"] - one[rounds]["accuracy"]  # (seeds, steps)
    row = {
        "devices": layout[0],
        "processes": layout[1],
        "first_step": first_step,
        "epoch": {
            "difference_by_seed": accuracy.mean(axis=1).tolist(),
            "first_step_with_a_flip_by_seed": [next(iter(x.tolist()), None) for x in steps],
            "share_of_answers_flipped_by_seed": flipped.mean(axis=1).tolist(),
        },
    }
    print(row, flush=True)
    return row


def params_sha256(output):
    return re.search(r"^params_sha256: (\w+)$", output, re.MULTILINE)[1]


@cache
def undisturbed_sha256(num_processes):
    """What a run of so many processes comes to if nothing happens to it."""
    with tempfile.TemporaryDirectory() as directory:
        first, *_ = finish(start_processes([[PROGRAM, *FLAGS]] * num_processes, directory))
    return params_sha256(first[0])


def kill(num_processes, victim, repeats=3):
    """A row of the table of deaths: seconds until the last other process has ended, and how."""
    expected = undisturbed_sha256(num_processes)
    row = {"processes": num_processes, "killed": victim, "seconds": []}
    row |= dict.fromkeys(("others", "others_with_own_line", "resumed", "same_result"), 0)
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as directory:
            processes = start_processes([[PROGRAM, *FLAGS]] * num_processes, directory)
            next(line for line in processes[0].stdout if line.startswith("Epoch 1/"))
            time.sleep(0.5)
            processes[victim].kill()
            began = time.perf_counter()
            ended = finish(processes)
            row["seconds"].append(time.perf_counter() - began)
            again = start_processes([[PROGRAM, "--resume=run"]] * num_processes, directory)
            resumed, *_ = finish(again)
        del ended[victim]
        row["others"] += len(ended)
        row["others_with_own_line"] += sum("grpo_mnist.py: " in errors for _, errors, _ in ended)
        row["resumed"] += 1
        row["same_result"] += params_sha256(resumed[0]) == expected
    print(row, flush=True)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    options, flags = parser.parse_known_args()
    data_dir = options.data_dir.resolve()
    if options.record:
        flags += ["--dataset=mnist", f"--data-dir={data_dir}", "--num-seeds=5"]
        for rounds, num_steps in STEPS.items():
            record([*flags, f"--num-iterations={rounds}"], num_steps, options.record)
        return
    alone = record_layout((1, 1), data_dir)
    same = [compare(layout, alone, record_layout(layout, data_dir)) for layout in LAYOUTS]
    killed = [kill(*victim) for victim in VICTIMS]
    write_results("devices", {"same": same, "killed": killed})


if __name__ == "__main__":
    main()
