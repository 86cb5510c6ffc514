"""What becomes of a run when it is killed, its disk fails, or its files are damaged.

The runs train on scikit-learn's digits. After each fault the run is continued at once, by another
process, and must end as the run to which nothing happened: with the same params_sha256, the same
metrics but for the times, and the same files. Writes results/faults.json; what that has already for
this very program is not tried again. tests/test_checkpoints.py tries fewer of the same.
"""

import argparse
import hashlib
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM
from unittest import mock

import numpy as np
from common import ROOT, results_to_continue, write_results

import grpo_mnist

# Short, and with everything in it that a checkpoint can hold.
FLAGS = (
    *("--dataset=digits", "--num-epochs=3", "--batch-size=8192", "--num-iterations=2"),
    *("--baseline=critic", "--beta=0.01", "--ref-sync-epochs=2", "--output-dir=run"),
)
RESUME = ("--resume", "run")


class Laboratory:
    """A directory for runs of a program, and the run among them to which nothing happens."""

    def __init__(self, directory, flags=FLAGS, in_process=False):
        self.directory = Path(directory)
        self.flags = flags
        self.program = grpo_mnist
        self.run = self.run_here if in_process else self.run_process
        self.environment = {
            "JAX_COMPILATION_CACHE_DIR": str(self.directory / "compiled"),
            "JAX_COMPILATION_CACHE_MAX_SIZE": str(2**30),  # With a limit, it has a lock.
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        } | os.environ
        self.report_epoch = grpo_mnist.report_epoch
        self.finished = self.new_place()

        def copy(epoch):
            shutil.copytree(self.finished, self.directory / f"epoch-{epoch}")

        status, _, errors = self.run_here(self.finished, *flags, after_epoch=copy)
        assert status == 0, errors
        self.expected = outcome(self.finished)

    def new_place(self, epoch=None):
        """A new working directory for a run, empty or as it was after an epoch."""
        place = Path(tempfile.mkdtemp(dir=self.directory))
        if epoch:
            shutil.copytree(self.directory / f"epoch-{epoch}", place, dirs_exist_ok=True)
        return place

    def run_here(self, place, *flags, after_epoch=lambda epoch: None):
        """Runs the program in this process: its status, standard output and standard error."""

        def report_epoch(config, history, run_dir):
            self.report_epoch(config, history, run_dir)
            after_epoch(len(history))

        output, errors = io.StringIO(), io.StringIO()
        patch = mock.patch.object(self.program, "report_epoch", report_epoch)
        with patch, chdir(place), redirect_stdout(output), redirect_stderr(errors):
            status = self.program.main(flags)
        return status, output.getvalue(), errors.getvalue()

    def run_process(self, place, *flags, script=(), wait=lambda _: None, number=0, timeout=300):
        """The same in a process, which gets a signal after wait, which returns what it has read."""
        command = [sys.executable, *script, self.program.__file__, *flags]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, cwd=place, env=self.environment, **pipes) as process:
            output = wait(process) or ""
            process.send_signal(number)  # Number 0 is none.
            rest, errors = process.communicate(timeout=timeout)
        return process.returncode, output + rest, errors

    def resume(self, place, *words, already=0):
        """Goes on with a run, or begins it; it says the words, and must end as it should."""
        flags = RESUME if (place / "run" / "config.json").exists() else self.flags
        status, output, errors = self.run(place, *flags)
        assert (status, errors) == (0, ""), errors
        assert all(word in output for word in words), output
        done = re.search(r"Resumed: (\d+) of", output)
        assert already <= (int(done[1]) if done else 0) or "run is finished" in output, output
        assert outcome(place) == self.expected, place
        shutil.rmtree(place)

    # --- the faults; an exception says what is not as it should be ---

    def stopped(self, number, wait):
        """By a signal, after wait(process)."""
        place = self.new_place()
        result = self.run_process(place, *self.flags, wait=wait, number=number, timeout=2)
        status, output, errors = result
        begun = (place / "run" / "config.json").exists()
        if status == 128 + number:
            hint = "; resume with: " if begun else "\n"
            check_refusal(result, status, f"stopped by {number.name}{hint}")
        else:  # It is over, or the system has ended it: by SIGKILL, during the imports, at the end.
            assert (errors, status in (0, -number)) == ("", True), result
            assert "completed! ---" in output or number == SIGKILL or not begun, result
        self.resume(place, already=output.count("\nEpoch "))

    def crashed(self, operation, loss):
        """At an operation on the disk. Whether the run has no such operation."""
        place = self.new_place()
        script = (ROOT / "benchmarks" / "fragile_disk.py", str(operation), loss)
        status, output, errors = self.run_process(place, *self.flags, script=script)
        shutil.rmtree(f"{place}.kept")
        if status == 0:
            return True
        if status != -SIGKILL:
            raise RuntimeError(errors)
        self.resume(place, already=output.count("\nEpoch "))

    def tampered(self, tamper, *words, epoch=2, status=0):
        """After an epoch, something happens to the newest checkpoint."""
        place = self.new_place(epoch)
        tamper(place / f"run/checkpoints/epoch-{epoch}.npz")
        if status == 0:
            self.resume(place, *words)
        else:
            check_refusal(self.run(place, *RESUME), status, *words)

    def full_disk(self):
        """After the first epoch, the system refuses a larger checkpoint."""
        import resource  # which Windows does not have

        place = self.new_place(epoch=1)
        size = (place / "run/checkpoints/epoch-1.npz").stat().st_size + 1000
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            result = self.run_here(place, *RESUME)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        check_refusal(result, 1, "run/checkpoints/epoch-2.npz: File too large; mend that, and")
        self.resume(place, already=1)

    def moved_away(self, leave_a_file):
        """After the first epoch the output directory goes, or a file takes its place."""
        place = self.new_place()
        run, elsewhere = place / "run", place / "elsewhere"

        def move(epoch):
            run.rename(elsewhere)
            if leave_a_file:
                run.touch()

        result = self.run_here(place, *self.flags, after_epoch=move)
        reason = "Not a directory" if leave_a_file else "No such file or directory"
        check_refusal(result, 1, f"cannot write run/checkpoints/epoch-2.npz: {reason}; ")
        run.unlink(missing_ok=not leave_a_file)
        elsewhere.rename(run)
        self.resume(place, already=1)

    def not_a_number(self):
        """The second epoch begins with NaN among the parameters; nothing is written."""
        place = self.new_place(epoch=1)
        checkpoint = place / "run/checkpoints/epoch-1.npz"
        whole = checkpoint.read_bytes()
        forge(checkpoint, lambda _, x: x["networks.actor.output.bias.value"].fill(np.nan))
        words = ("epoch 2, seed 0: not finite: ", "actor.hidden_1.kernel.value", "loss")
        check_refusal(self.run(place, *RESUME), 1, *words)
        assert list(checkpoint.parent.iterdir()) == [checkpoint]
        checkpoint.write_bytes(whole)
        self.resume(place, already=1)

    def second_run(self):
        """After the first epoch of one, another in its directory is refused, and does no harm."""
        place = self.new_place()

        def start_another(epoch):
            if epoch == 1:
                check_refusal(self.run(place, *RESUME), 2, "another run is using it")

        status, _, errors = self.run_here(place, *self.flags, after_epoch=start_another)
        assert status == 0, errors
        assert outcome(place) == self.expected, place


def check_refusal(result, status, *words):
    """A run must have ended with the status, and one line on standard error with the words."""
    assert (result[0], result[2].count("\n")) == (status, 1), result
    assert all(word in result[2] for word in ("grpo_mnist.py: ", *words)), result


def read_until(process, beginning):
    """Reads what a process prints up to a line that begins so."""
    output = ""
    for line in process.stdout:
        output += line
        if line.startswith(beginning):
            return output
    raise AssertionError(f"ended before {beginning}: {process.stderr.read()}")


def metrics_without_times(run):
    """The lines of metrics.jsonl, of which two runs that are the same must have the same."""
    times = {"seconds": None, "images_per_second": None}
    lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) | times for line in lines]


def outcome(place):
    """What two runs that are the same must agree in."""
    run = place / "run"
    may_differ = {"program_sha256": None, "resume": None, "seconds": None}
    config, summary = (json.loads((run / f"{x}.json").read_text()) for x in ("config", "summary"))
    picture = (run / "curves.png").read_bytes()
    files = sorted(str(path.relative_to(place)) for path in place.rglob("*"))
    return config | may_differ, summary | may_differ, metrics_without_times(run), picture, files


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def forge(path, change):
    """Writes a checkpoint anew with its header or its arrays changed, digest included."""
    arrays = dict(np.load(path))
    header = json.loads(str(arrays.pop("header")))
    change(header, arrays)
    content = io.BytesIO()
    np.savez(content, header=json.dumps(header), **arrays)
    path.write_bytes(content.getvalue() + hashlib.sha256(content.getvalue()).digest())


def everything(lab):
    """(fault, promise, functions that try it) for each fault."""
    for _ in range(2):  # The second run finds what the first one has compiled.
        began = time.perf_counter()
        lab.resume(lab.new_place())
    seconds = time.perf_counter() - began
    size = (lab.new_place(epoch=2) / "run/checkpoints/epoch-2.npz").stat().st_size
    moments = random.Random(1)

    def stops(number, times):
        pauses = [moments.uniform(0, seconds) for _ in range(times)]
        return [partial(lab.stopped, number, lambda _, x=x: time.sleep(x)) for x in pauses]

    def crashes(loss):
        return [partial(lab.crashed, operation, loss) for operation in range(1, 60)]

    def tampers(functions, said, **options):
        return [partial(lab.tampered, function, said, **options) for function in functions]

    same = "resumed, the same result"
    yield "SIGKILL at a random moment", same, stops(SIGKILL, 50)
    fault = "SIGKILL at the n-th write, fsync, rename or unlink, every n"
    yield fault, same, crashes("nothing")
    yield "power cut there: contents not synced are lost", same, crashes("contents")
    yield "power cut there: names not synced are lost too", same, crashes("all")
    resumed = [partial(lab.tampered, os.stat, f"Resumed: {n} of", epoch=n) for n in (1, 2, 3)]
    yield "resumed after each epoch", same, resumed
    before = f"a notice; from the one before, {same}"
    said = "epoch-2.npz does not match its SHA-256"
    lengths = [*(size * i // 16 for i in range(1, 16)), size - 1]
    cut = [partial(os.truncate, length=length) for length in [0, *lengths]]
    flips = [partial(flip, bit=bit) for bit in random.Random(0).sample(range(8 * size), 200)]
    yield "newest checkpoint cut short", before, tampers(cut[1:], said)
    yield "newest checkpoint emptied", before, tampers(cut[:1], said)
    yield "newest checkpoint deleted", before, tampers([os.unlink], "Resumed: 1 of 3")
    yield "one bit of the newest checkpoint flipped", before, tampers(flips, said)
    both = [lambda path, x=x: [*map(x, path.parent.iterdir())] for x in (cut[1], flips[0])]
    said = "run/checkpoints: no whole checkpoint"
    yield "both checkpoints damaged", "one line, status 1", tampers(both, said, status=1)
    stop = f"one line, status 1; {same}"
    yield "disk full", stop, [lab.full_disk]
    yield "output directory moved away", stop, [partial(lab.moved_away, leave_a_file=False)]
    yield "a file in its place", stop, [partial(lab.moved_away, leave_a_file=True)]
    for number in (SIGINT, SIGTERM):
        promise = f"ends at once, status {128 + number}; {same}"
        yield f"{number.name} at a random moment", promise, stops(number, 10)
    newer = [partial(forge, change=lambda header, _: header.update(format=3))]
    promise = "one line with both, status 2"
    yield "checkpoint of a newer format", promise, tampers(newer, "format 3, not 2", status=2)
    older = [partial(forge, change=lambda x, _: x["facts"]["versions"].update(jax="0.4.1"))]
    promise = "a notice with both"
    yield "checkpoint of another library version", promise, tampers(older, "jax was 0.4.1, is ")
    yield "NaN in the parameters", stop, [lab.not_a_number]
    promise = "one line, status 2; the first is not disturbed"
    yield "a second run in the directory", promise, [lab.second_run]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--anew", action="store_true", help="try again what was tried before")
    parser.add_argument("--data-dir", help="not used; the digits come with scikit-learn")
    rows = results_to_continue("faults", parser.parse_args().anew).get("rows", [])
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(2) as pool:
        for fault, promise, attempts in everything(Laboratory(directory)):
            if fault not in [row["fault"] for row in rows]:
                futures = [pool.submit(attempt) for attempt in attempts]
                outcomes = [future.exception() or future.result() for future in futures]
                tried = [each for each in outcomes if each is not True]
                print(fault, *filter(None, tried), sep="\n", flush=True)
                counts = {"tried": len(tried), "kept": tried.count(None)}
                rows.append({"fault": fault, "promise": promise} | counts)
                write_results("faults", {"flags": " ".join(FLAGS), "rows": rows})


if __name__ == "__main__":
    main()
