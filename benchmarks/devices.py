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
from common import ROOT, grpo_mnist, spread, write_results

LAYOUTS = ((1, 1), (2, 1), (8, 1), (2, 2), (4, 4))  # devices in all, processes
VICTIMS = ((2, 1), (2, 0), (4, 3), (4, 0))  # processes, the one that is killed
FLAGS = ("--dataset=digits", "--num-epochs=3", "--output-dir=run")


def record(dataset_name, data_dir, num_steps, path, flags):
    """A process of a run: samples as the step will, then takes it; the first one writes it down."""
    config = grpo_mnist.parse_flags(flags)
    grpo_mnist.join_processes(config)
    dataset = grpo_mnist.load_dataset(dataset_name, data_dir)
    steps_per_epoch = len(dataset.train_images) // config.batch_size
    state = grpo_mnist.create_state(config)
    batches = list(grpo_mnist.batches(dataset, config, epoch=1))[:num_steps]
    step = grpo_mnist.compile_step(state, batches[0], config, 10 * steps_per_epoch)
    on_each_device, by_image = grpo_mnist.shardings()
    leaves, structure = jax.tree.flatten(state)

    def sample(leaves, images, labels):
        state = jax.tree.unflatten(structure, [leaf.squeeze(0) for leaf in leaves])
        key = jax.random.split(state.key)[1]  # as train_step does
        rollout = grpo_mnist.sample_rollout(state, images[0], labels[0], key, config)
        return rollout.actions, rollout.rewards

    placed = (on_each_device, by_image, by_image)
    sample = jax.jit(sample, in_shardings=placed, out_shardings=on_each_device)
    actions, rewards, accuracy, parameters = [], [], [], []
    for batch in batches:
        shares = (jax.make_array_from_callback(x.shape, by_image, x.__getitem__) for x in batch)
        for seen, values in zip((actions, rewards), sample(leaves, *shares), strict=True):
            seen.append(np.asarray(values))
        leaves, metrics = step(leaves, *batch)
        accuracy.append(metrics["accuracy"].item())
        if not parameters:
            networks = jax.tree.unflatten(structure, leaves).networks
            parameters = [np.asarray(x).ravel() for x in jax.tree.leaves(networks)]
    if jax.process_index() == 0:
        arrays = {"actions": actions, "rewards": rewards, "accuracy": accuracy}
        np.savez(path, parameters=np.concatenate(parameters), **arrays)


def environment(devices_each=1):
    flag = f"--xla_force_host_platform_device_count={devices_each}"
    without_proxies = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    return without_proxies | {"XLA_FLAGS": flag}


def start_processes(command, num_processes, directory=None, devices_each=1):
    """The processes of one run, with the flags that let them meet, and output to read."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    meet = [f"--coordinator-address={address}", f"--num-processes={num_processes}"]
    return [
        subprocess.Popen(
            [sys.executable, *command, *(meet if num_processes > 1 else [])]
            + ([f"--process-id={number}"] if num_processes > 1 else []),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=directory,
            env=environment(devices_each),
        )
        for number in range(num_processes)
    ]


def record_layout(num_devices, num_processes, num_steps, dataset_name, data_dir):
    """The arrays that record wrote, of a run on so many devices."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "run.npz"
        command = [__file__, "--record", str(path), "--steps", str(num_steps)]
        command += ["--dataset", dataset_name, "--data-dir", str(data_dir)]
        each = num_devices // num_processes
        processes = start_processes(command, num_processes, devices_each=each)
        for process in processes:
            _, errors = process.communicate(timeout=300)
            if process.returncode:
                raise RuntimeError(errors)
        return dict(np.load(path))


def compare(layout, one, other):
    """A row of the table: what is equal to the run on one device, and how far the rest is off."""
    differences = np.abs(one["parameters"] - other["parameters"])
    flipped = (one["actions"] != other["actions"]).sum(axis=(1, 2))
    (steps_with_flips,) = np.nonzero(flipped)
    return {
        "devices": layout[0],
        "processes": layout[1],
        "first_step": {
            "actions_equal": bool((one["actions"][0] == other["actions"][0]).all()),
            "rewards_equal": bool((one["rewards"][0] == other["rewards"][0]).all()),
            "largest_difference": float(differences.max()),
            "parameters_beyond_1e-6": int((differences > 1e-6).sum()),
            "parameters": len(differences),
        },
        "epoch": {
            "accuracy": float(other["accuracy"].mean()),
            "difference": float(other["accuracy"].mean() - one["accuracy"].mean()),
            "steps": len(flipped),
            "first_step_with_a_flip": int(steps_with_flips[0]) + 1 if flipped.any() else None,
            "flipped_answers": int(flipped.sum()),
            "answers": int(other["actions"].size),
        },
    }


def finish(processes, timeout=150):
    """Waits for them all: status, output and errors of each."""
    return [
        (output, errors, process.returncode)
        for process in processes
        for output, errors in [process.communicate(timeout=timeout)]
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
        spoke = [
            any(line.startswith("grpo_mnist.py: ") for line in e.splitlines()) for _, e, _ in others
        ]
        resumed = finish(start_processes([program, "--resume=run"], num_processes, directory))
        same = params_sha256(resumed[0][0]) == undisturbed
        return {
            "processes": num_processes,
            "killed": victim,
            "seconds": seconds,
            "statuses": [status for _, _, status in others],
            "own_line": spoke,
            "resumed_to_the_same_result": same,
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3, help="kills of each victim")
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--dataset", default="mnist", help=argparse.SUPPRESS)
    options, flags = parser.parse_known_args()
    data_dir = options.data_dir.resolve()
    if options.record:
        record(options.dataset, data_dir, options.steps, options.record, flags)
        return
    runs = {layout: record_layout(*layout, 58, "mnist", data_dir) for layout in LAYOUTS}
    rows = [compare(layout, runs[1, 1], runs[layout]) for layout in LAYOUTS]
    for row in rows:
        print(row, flush=True)
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
