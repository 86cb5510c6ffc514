"""What becomes of a run when it is killed, its disk fails, or its files are damaged.

The runs train on scikit-learn's digits. After each fault the run is continued at once, by another
process, and must end as the run to which nothing happened: with the same params_sha256, the same
metrics but for the times, and the same files. Writes results/faults.json; without --anew, what it
holds for this very program is not tried again. tests/test_checkpoints.py tries fewer of the same.
"""

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
import timeit
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir, redirect_stderr, redirect_stdout
from functools import partial
from operator import methodcaller
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM
from unittest import mock

import numpy as np
import tyro
from common import results_to_continue, write_results

import grpo_mnist
from grpo_mnist import report_epoch

# Short, and with everything in it that a checkpoint can hold.
FLAGS = (
    "--dataset=digits --num-epochs=3 --batch-size=8192 --num-iterations=2 "
    "--baseline=critic --beta=0.01 --ref-sync-epochs=2 --output-dir=run"
)
RESUME = ("--resume", "run")


class Laboratory:
    """A directory for runs of a program, and the run among them to which nothing happens.

    The methods after resume are the faults; an exception says what is not as it should be.
    """

    def __init__(self, directory, flags=FLAGS, in_process=False):
        self.directory, self.flags, self.program = Path(directory), flags.split(), grpo_mnist
        self.run = self.run_here if in_process else self.run_process
        self.wait = partial(read_until, beginning="Output: ")  # for a signal
        (self.directory / "epoch-0").mkdir()
        self.finished = self.new_place()

        def report_and_copy(config, history, run_dir):
            report_epoch(config, history, run_dir)
            shutil.copytree(self.finished, self.directory / f"epoch-{len(history)}")

        with mock.patch.object(grpo_mnist, "report_epoch", report_and_copy):
            status, _, errors = self.run_here(self.finished, *self.flags)
        assert status == 0, errors
        self.expected = outcome(self.finished)

    def new_place(self, epoch=0):
        """A new working directory for a run, empty or as it was after an epoch."""
        place = tempfile.mkdtemp(dir=self.directory)
        return Path(shutil.copytree(self.directory / f"epoch-{epoch}", place, dirs_exist_ok=True))

    def run_here(self, place, *flags, **options):
        """Runs the program in this process: its status, standard output and standard error."""
        output, errors = io.StringIO(), io.StringIO()
        with chdir(place), redirect_stdout(output), redirect_stderr(errors):
            status = self.program.main(flags, **options)
        return status, output.getvalue(), errors.getvalue()

    def run_process(self, place, *flags, script=(), wait=lambda _: None, number=0, timeout=300):
        """The same in a process, which gets a signal after wait, which returns what it has read."""
        command = [sys.executable, *script, self.program.__file__, *flags]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, cwd=place, **pipes) as process:
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

    def stopped(self, number):
        """By a signal."""
        place = self.new_place()
        result = self.run_process(place, *self.flags, wait=self.wait, number=number, timeout=2)
        status, output, errors = result
        begun = (place / "run" / "config.json").exists()
        if status == 128 + number:
            check_refusal(result, status, f"stopped by {number.name}" + "; resume with: " * begun)
        else:  # It is over, or the system has ended it: by SIGKILL, during the imports, at the end.
            assert (errors, status in (0, -number)) == ("", True), result
            assert "completed! ---" in output or number == SIGKILL or not begun, result
        self.resume(place, already=output.count("\nEpoch "))

    def crashed(self, operation, loss):
        """At an operation on the disk. Whether the run has no such operation."""
        place = self.new_place()
        script = (Path(__file__).with_name("fragile_disk.py"), str(operation), loss)
        status, output, errors = self.run_process(place, *self.flags, script=script)
        if status == 0:
            return True
        if status != -SIGKILL:
            raise RuntimeError(errors)
        self.resume(place, already=output.count("\nEpoch "))

    def tampered(self, tamper, *words, epoch=2, status=0):
        """After an epoch, the newest checkpoint; if the run is refused, it is put back."""
        place = self.new_place(epoch)
        newest = place / f"run/checkpoints/epoch-{epoch}.npz"
        whole, names = newest.read_bytes(), os.listdir(newest.parent)
        tamper(newest)
        if status == 0:
            return self.resume(place, *words)
        check_refusal(self.run(place, *RESUME), status, *words)
        assert os.listdir(newest.parent) == names
        newest.write_bytes(whole)
        self.resume(place, already=epoch)

    def unwritable(self, prevent, reason, mend):
        """After the first epoch, a command prevents the next checkpoint; another mends that."""
        place = self.new_place()
        shell = partial(subprocess.run, shell=True, cwd=place, check=True)

        def report_and_prevent(*arguments):
            report_epoch(*arguments)
            shell(prevent)

        try:
            with mock.patch.object(self.program, "report_epoch", report_and_prevent):
                result = self.run_here(place, *self.flags)
        finally:
            shell(mend)
        check_refusal(result, 1, f"cannot write run/checkpoints/epoch-2.npz: {reason}; ")
        self.resume(place, already=1)

    def second_run(self):
        """Another run in the directory of one is refused, and does no harm."""
        place = self.new_place(epoch=1)

        def start_another(_):
            check_refusal(self.run(place, *RESUME), 2, "another run is using it")

        status, _, errors = self.run_here(place, *RESUME, on_start=start_another)
        assert status == 0, errors
        assert outcome(place) == self.expected, place


def check_refusal(result, status, *words):
    """A run must have ended with the status, and one line on standard error with the words."""
    assert (result[0], result[2].count("\n")) == (status, 1), result
    assert result[2].startswith("grpo_mnist.py: "), result
    assert all(word in result[2] for word in words), result


def read_until(process, beginning):
    """Reads what a process prints up to a line that begins so."""
    output = line = ""
    while not line.startswith(beginning):
        line = process.stdout.readline()
        assert line, f"ended before {beginning}: {process.stderr.read()}"
        output += line
    return output


def metrics_without_times(run, file="metrics.jsonl"):
    """The text of a file, but for what may differ in two runs that are the same."""
    may_differ = r'"(program_sha256|resume|seconds|images_per_second)": [^,}\n]+'
    return re.sub(may_differ, "", (Path(run) / file).read_text())


def outcome(place):
    """What two runs that are the same must agree in."""
    run, files = place / "run", ("config.json", "metrics.jsonl", "summary.json")
    texts = [metrics_without_times(run, file) for file in files]
    names = sorted(str(path.relative_to(place)) for path in place.rglob("*"))
    return texts, (run / "curves.png").read_bytes(), names


def cut(path, part):
    """Leaves the first part of a file, at most all but a byte."""
    os.truncate(path, round(part * (path.stat().st_size - 1)))


def flip(path, part):
    """Flips the bit that comes after the first part of a file."""
    content = bytearray(path.read_bytes())
    bit = int(part * 8 * len(content))
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


def everything():
    """(fault, promise, attempts) for each fault; an attempt is called with a Laboratory."""
    same = "resumed, the same result"
    for number, times in ((SIGKILL, 50), (SIGINT, 10), (SIGTERM, 10)):
        promise = same if number == SIGKILL else f"ends at once, status {128 + number}; {same}"
        attempts = [methodcaller("stopped", number)] * times
        yield f"{number.name} at a random moment", promise, attempts
    for loss, fault in (
        ("nothing", "SIGKILL at the n-th write, fsync, rename or unlink, every n"),
        ("contents", "power cut there: contents not synced are lost"),
        ("all", "power cut there: names not synced are lost too"),
    ):
        yield fault, same, [methodcaller("crashed", n, loss) for n in range(1, 60)]
    resumed = [methodcaller("tampered", os.stat, f"Resumed: {n} of", epoch=n) for n in (1, 2, 3)]
    yield "resumed after each epoch", same, resumed
    empty, *cuts = [partial(cut, part=part) for part in np.linspace(0, 1, 17)]
    flips = [partial(flip, part=part) for part in np.random.default_rng(0).random(200)]
    both = [lambda path, x=x: [*map(x, path.parent.iterdir())] for x in (cuts[0], flips[0])]
    new = partial(forge, change=lambda header, _: header.update(format=3))
    old = partial(forge, change=lambda header, _: header["facts"]["versions"].update(jax="0.4.1"))
    before, damaged = f"a notice; from the one before, {same}", "epoch-2.npz does not match its SHA"
    for fault, promise, tampers, said, status in (
        ("newest checkpoint cut short", before, cuts, damaged, 0),
        ("newest checkpoint emptied", before, [empty], damaged, 0),
        ("newest checkpoint deleted", before, [os.unlink], "Resumed: 1 of 3", 0),
        ("one bit of the newest checkpoint flipped", before, flips, damaged, 0),
        ("both checkpoints damaged", "one line, status 1", both, "no whole checkpoint", 1),
        ("checkpoint of a newer format", "one line with both, status 2", [new], "3, not 2", 2),
        ("checkpoint of another library version", "a notice with both", [old], "was 0.4.1, is", 0),
    ):
        yield fault, promise, [methodcaller("tampered", x, said, status=status) for x in tampers]
    stop = f"one line, status 1; {same}"
    nan = partial(forge, change=lambda _, x: x["networks.actor.output.bias.value"].fill(np.nan))
    words = ("epoch 2, seed 0: not finite: ", "loss", "actor.hidden_1.kernel.value")
    yield "NaN in the parameters", stop, [methodcaller("tampered", nan, *words, epoch=1, status=1)]
    limit = "prlimit --pid=$PPID --fsize={}:"  # of the file size of this process
    for fault, *how in (  # what prevents writing, the reason that is given, and what mends it
        ("disk full", limit.format(10**6), "File too large", limit.format("unlimited")),
        ("output directory moved away", "mv run away", "No such file or directory", "mv away run"),
        ("a file in its place", "mv run away; touch run", "Not a directory", "rm run; mv away run"),
    ):
        yield fault, stop, [methodcaller("unwritable", *how)]
    promise = "one line, status 2; the first is not disturbed"
    yield "a second run in the directory", promise, [methodcaller("second_run")]


def main(anew: bool = False):
    rows = results_to_continue("faults", anew).get("rows", [])
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(2) as pool:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{directory}/compiled"
        os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(2**30)  # With a limit, it has a lock.
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        lab = Laboratory(directory)
        # The second run finds what the first one has compiled.
        _, seconds = timeit.repeat(lambda: lab.resume(lab.new_place()), number=1, repeat=2)
        moments = random.Random(1)
        lab.wait = lambda _: time.sleep(moments.uniform(0, seconds))
        for fault, promise, attempts in everything():
            if fault not in [row["fault"] for row in rows]:
                futures = [pool.submit(attempt, lab) for attempt in attempts]
                outcomes = [future.exception() or future.result() for future in futures]
                tried = [each for each in outcomes if each is not True]
                print(fault, *filter(None, tried), sep="\n", flush=True)
                counts = {"tried": len(tried), "kept": tried.count(None)}
                rows.append({"fault": fault, "promise": promise} | counts)
                write_results("faults", {"flags": FLAGS, "rows": rows})


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
