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
import dataclasses
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from common import ROOT, grpo_mnist, spread, state_and_step, write_results

LAYOUTS = ((2, 1), (8, 1), (2, 2), (4, 4))  # devices in all, processes
VICTIMS = ((2, 1), (2, 0), (4, 3), (4, 0))  # processes, the one that is killed
FLAGS = ("--dataset=digits", "--num-epochs=3", "--output-dir=run")


def record(dataset_name, data_dir, num_seeds, num_steps, path, flags):
    """A process of a run: samples as the step will, then takes it; the first one writes it down."""
    given = grpo_mnist.parse_flags(flags)
    grpo_mnist.start_jax(given)
    dataset = grpo_mnist.load_dataset(dataset_name, data_dir)
    seen = {
        f"rounds_{rounds}_seed_{seed}_{name}": values
        for rounds, steps in ((1, 1), (given.num_iterations, num_steps))
        for seed in range(num_seeds)
        for name, values in record_steps(
            dataset, dataclasses.replace(given, num_iterations=rounds, seed=seed), steps
        ).items()
    }
    if jax.process_index() == 0:
        np.savez(path, **seen)


def record_steps(dataset, config, num_steps):
    """The answers and rewards of steps, their accuracy, and the parameters after the first."""
    state, step = state_and_step(dataset, config)
    on_each_device, by_image = grpo_mnist.shardings()

    def sample(state, images, labels):
        state = jax.tree.map(lambda x: x.squeeze(0), state)
        key = jax.random.split(state.key)[1]  # as train_step does
        rollout = grpo_mnist.sample_rollout(state, images[0], labels[0], key, config)
        return rollout.actions, rollout.rewards

    placed = (on_each_device, by_image, by_image)
    sample = jax.jit(sample, in_shardings=placed, out_shardings=on_each_device)
    seen = {"actions": [], "rewards": [], "accuracy": []}
    for batch in itertools.islice(grpo_mnist.batches(config, dataset, epoch=1), num_steps):
        shares = (jax.make_array_from_callback(x.shape, by_image, x.__getitem__) for x in batch)
        actions, rewards = sample(state, *shares)
        seen["actions"].append(np.asarray(actions))
        seen["rewards"].append(np.asarray(rewards))
        state, metrics = step(state, *batch)
        seen["accuracy"].append(metrics["accuracy"].item())
        if "parameters" not in seen:
            flat = [np.asarray(leaf).ravel() for leaf in jax.tree.leaves(state.networks)]
            seen["parameters"] = np.concatenate(flat)
    return seen


def environment(devices_each=1):
    flag = f"--xla_force_host_platform_device_count={devices_each}"
    without_proxies = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    return without_proxies | {"XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"}


def start_processes(command, num_processes, directory=None, devices_each=1, own_flags=None):
    """The processes of one run, with the flags that let them meet, and output to read."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = []
    for number in range(num_processes):
        flags = [f"--coordinator-address={address}", f"--num-processes={num_processes}"]
        flags = [*flags, f"--process-id={number}"] if num_processes > 1 else []
        processes.append(
            subprocess.Popen(
                [sys.executable, *command, *flags, *(own_flags[number] if own_flags else ())],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=directory,
                env=environment(devices_each),
            )
        )
    return processes


def record_layout(layout, num_seeds, num_steps, dataset_name, data_dir):
    """What record has written of runs on so many devices, in so many processes."""
    num_devices, num_processes = layout
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "run.npz"
        command = [__file__, "--record", str(path), "--seeds", str(num_seeds)]
        command += ["--steps", str(num_steps), "--dataset", dataset_name]
        command += ["--data-dir", str(data_dir)]
        each = num_devices // num_processes
        for _, errors, status in finish(start_processes(command, num_processes, None, each), 600):
            if status:
                raise RuntimeError(errors)
        return dict(np.load(path))


def compare(layout, one, other, num_seeds, rounds=4):
    """A row of the table: what is equal to the runs on one device, and how far the rest is off."""

    def both(name, rounds=rounds):
        return (
            np.array([each[f"rounds_{rounds}_seed_{seed}_{name}"] for seed in range(num_seeds)])
            for each in (one, other)
        )

    def equal(name):
        return all(
            bool((here[:, 0] == there[:, 0]).all())
            for here, there in (both(name), both(name, rounds=1))
        )

    def differences(rounds):
        here, there = both("parameters", rounds)
        off = np.abs(here - there)
        return {
            "largest_by_seed": off.max(axis=1).tolist(),
            "share_beyond_1e-6_by_seed": (off > 1e-6).mean(axis=1).tolist(),
        }

    here, there = both("actions")
    flipped = (here != there).sum(axis=(2, 3))  # (seeds, steps)
    accuracy, other_accuracy = both("accuracy")
    return {
        "devices": layout[0],
        "processes": layout[1],
        "first_step": {
            "actions_equal": equal("actions"),
            "rewards_equal": equal("rewards"),
            "parameters_after_1_round": differences(1),
            f"parameters_after_{rounds}_rounds": differences(rounds),
        },
        "epoch": {
            "difference_by_seed": (other_accuracy - accuracy).mean(axis=1).tolist(),
            "steps": flipped.shape[1],
            "first_step_with_a_flip_by_seed": [
                int(np.argmax(of_seed > 0)) + 1 if of_seed.any() else None for of_seed in flipped
            ],
            "share_of_answers_flipped_by_seed": (flipped.sum(axis=1) / here[0].size).tolist(),
        },
    }


def finish(processes, timeout=150):
    """Waits for them all, and for none longer than that: output, errors and status of each."""
    try:
        spoken = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [
        (output, errors, process.returncode)
        for (output, errors), process in zip(spoken, processes, strict=True)
    ]


def params_sha256(output):
    return re.search(r"^params_sha256: (\w+)$", output, re.MULTILINE)[1]


def kill(num_processes, victim, undisturbed):
    """Kills one process in the second epoch: seconds until the last other has ended, and how."""
    with tempfile.TemporaryDirectory() as directory:
        program = str(ROOT / "grpo_mnist.py")
        processes = start_processes([program, *FLAGS], num_processes, directory)
        for line in processes[0].stdout:
            if line.startswith("Epoch 1/"):
                break
        time.sleep(0.5)
        processes[victim].send_signal(signal.SIGKILL)
        began = time.perf_counter()
        ended = finish(processes)
        seconds = time.perf_counter() - began
        others = [each for number, each in enumerate(ended) if number != victim]
        spoke = ["grpo_mnist.py: " in errors for _, errors, _ in others]
        resumed = finish(start_processes([program, "--resume=run"], num_processes, directory))
        same = params_sha256(resumed[0][0]) == undisturbed
        return {
            "processes": num_processes,
            "killed": victim,
            "seconds": seconds,
            "own_line": spoke,
            "resumed_to_the_same_result": same,
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3, help="kills of each victim")
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=58, help=argparse.SUPPRESS)
    parser.add_argument("--dataset", default="mnist", help=argparse.SUPPRESS)
    options, flags = parser.parse_known_args()
    data_dir = options.data_dir.resolve()
    if options.record:
        size = options.seeds, options.steps
        record(options.dataset, data_dir, *size, options.record, flags)
        return
    rows = []
    what = options.seeds, options.steps, options.dataset, data_dir
    alone = record_layout((1, 1), *what)
    for layout in LAYOUTS:
        rows.append(compare(layout, alone, record_layout(layout, *what), options.seeds))
        print(rows[-1], flush=True)
    program = str(ROOT / "grpo_mnist.py")
    deaths = []
    undisturbed = {}
    for num_processes, victim in VICTIMS:
        if num_processes not in undisturbed:
            with tempfile.TemporaryDirectory() as directory:
                first, *_ = finish(start_processes([program, *FLAGS], num_processes, directory))
                undisturbed[num_processes] = params_sha256(first[0])
        kills = [
            kill(num_processes, victim, undisturbed[num_processes]) for _ in range(options.repeats)
        ]
        deaths.append(
            {
                "processes": num_processes,
                "killed": victim,
                "seconds": spread([each["seconds"] for each in kills]),
                "others": sum(len(each["own_line"]) for each in kills),
                "others_with_own_line": sum(sum(each["own_line"]) for each in kills),
                "resumed": len(kills),
                "same_result": sum(each["resumed_to_the_same_result"] for each in kills),
            }
        )
        print(deaths[-1], flush=True)
    write_results("devices", {"same": rows, "killed": deaths})


if __name__ == "__main__":
    main()
