"""What becomes of a run when it is killed, its disk fails, or its files are damaged.

    python benchmarks/faults.py

Every fault happens to a real process that trains on scikit-learn's digits; then the run is
continued at once by another one, which finds the directory's lock free, and must end as the run
that nothing happened to: the same params_sha256, the same metrics.jsonl but for the times, the same
files. Writes results/faults.json, in about 45 minutes; what that has already for this very program
is not tried again. tests/test_checkpoints.py tries fewer of the same.
"""

import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from common import RESULTS, ROOT, library_versions, write_results

PROGRAM = ROOT / "grpo_mnist.py"
FRAGILE_DISK = ROOT / "benchmarks" / "fragile_disk.py"
# Short, and with everything in it that a checkpoint can hold.
FLAGS = (
    *("--dataset=digits", "--num-epochs=3", "--batch-size=8192", "--num-iterations=2"),
    *("--baseline=critic", "--beta=0.01", "--ref-sync-epochs=2", "--output-dir=run"),
)
AT_ONCE = 2  # seconds
NOT_A_NUMBER = {
    "parameters": """
compile_step = grpo_mnist.compile_step
def compile_with_a_hole(*arguments):
    step = compile_step(*arguments)
    def with_a_hole(state, *batch):
        if state.optimizer_state.count == 8:  # once, at the beginning of the second epoch
            bias = state.networks.actor.output.bias
            bias[...] = bias[...] * float("nan")
        return step(state, *batch)
    return with_a_hole
grpo_mnist.compile_step = compile_with_a_hole
""",
    "gradients": """
import jax, jax.numpy as jnp, optax
create = grpo_mnist.create_optimizer
def create_optimizer(*arguments):
    adam = create(*arguments)
    def update(gradients, state):
        factor = jnp.where(state.count == 11, jnp.nan, 1.0)  # once, in the second epoch
        return adam.update(jax.tree.map(lambda x: factor * x, gradients), state)
    return optax.GradientTransformation(adam.init, update)
grpo_mnist.create_optimizer = create_optimizer
""",
    "data": """
import numpy as np
batches = grpo_mnist.batches
def with_a_hole(config, dataset, epoch):
    for images, labels in batches(config, dataset, epoch):
        images = images.astype(np.float32)
        if epoch == 2:
            images[0, 0, 400] = np.nan
        yield images, labels
grpo_mnist.batches = with_a_hole
""",
}


class Laboratory:
    """A directory for the runs, and what the undisturbed one among them came to."""

    def __init__(self, directory):
        self.directory = Path(directory)
        self.environment = os.environ | {"TFDS_DATA_DIR": str(self.directory / "no-data")}
        # What is compiled is kept here, but for those that are killed or stopped.
        cache = {"JAX_COMPILATION_CACHE_DIR": str(self.directory / "compiled")}
        cache["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        self.compiled = self.environment | cache
        self.by_epoch = []  # copies of the directory, as it was after each epoch
        self.finished = self.new_place()
        began = time.perf_counter()
        process = self.start(self.finished, *FLAGS)
        for line in process.stdout:
            if line.startswith("Epoch ") and line[6].isdigit():
                process.send_signal(signal.SIGSTOP)
                self.by_epoch.append(self.new_place(self.finished))
                process.send_signal(signal.SIGCONT)
        assert process.wait() == 0, process.stderr.read()
        process.stderr.close()
        self.seconds = time.perf_counter() - began
        self.expected = outcome(self.finished)
        # Alone, since two processes that compile the same at once spoil each other's copies.
        assert self.resumed_from(1)

    def new_place(self, copied_from=None):
        """A new working directory for a process, empty or a copy."""
        place = Path(tempfile.mkdtemp(dir=self.directory))
        if copied_from:
            shutil.copytree(copied_from, place, dirs_exist_ok=True)
        return place

    def start(self, place, *flags, program=(PROGRAM,), cold=False, prefix=()):
        """Starts a program as a user would."""
        return subprocess.Popen(
            [*prefix, sys.executable, *map(str, program), *flags],
            cwd=place,
            env=self.environment if cold else self.compiled,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, place, *flags, **options):
        """Runs a program to its end; its status, standard output and standard error."""
        with self.start(place, *flags, **options) as process:
            output, errors = process.communicate(timeout=300)
        return process.returncode, output, errors

    def resumed(self, place, *words, program=PROGRAM, already=0, cold=False):
        """Whether the run in a place goes on (or begins, if it had not) and ends as it should.

        Words are what has to be said then; already are the epochs that must not be lost.
        """
        flags = ("--resume", "run") if (place / "run" / "config.json").exists() else FLAGS
        status, output, errors = self.run(place, *flags, program=(program,), cold=cold)
        done = re.search(r"Resumed: (\d+) of|run is finished", output)
        kept = 0 if done is None else int(done[1] or len(self.expected["metrics"]))
        good = (status, errors) == (0, "") and outcome(place) == self.expected
        good = good and kept >= already and all(word in output for word in words)
        if good:
            shutil.rmtree(place)
        return verdict(good, place, status, output, errors)

    def refused(self, place, status, *words, flags=("--resume", "run"), **options):
        """Whether a program ends with the status and one line on standard error with the words."""
        found, output, errors = self.run(place, *flags, **options)
        lines = errors.splitlines()
        good = found == status and len(lines) == 1 and all(word in lines[0] for word in words)
        return verdict(good, place, found, output, errors)

    # --- the faults; each tells whether all was as it should be ---

    def killed(self, seconds):
        place = self.new_place()
        with self.start(place, *FLAGS, cold=True) as process:
            time.sleep(seconds)
            process.kill()
            process.communicate()
        return self.resumed(place, cold=True)

    def crashed(self, operation, loss, program=PROGRAM):
        """None if the run has no such operation; an epoch that was reported must not be lost."""
        place = self.new_place()
        script = (FRAGILE_DISK, program, str(operation), loss)
        status, output, errors = self.run(place, *FLAGS, program=script)
        if status == 0:
            return None
        assert status == -signal.SIGKILL, errors
        shutil.rmtree(f"{place}.lost", ignore_errors=True)
        already = len(re.findall(r"^Epoch \d+/", output, re.MULTILINE))
        return self.resumed(place, program=program, already=already)

    def resumed_from(self, epoch, program=PROGRAM):
        return self.resumed(
            self.new_place(self.by_epoch[epoch - 1]), program=program, already=epoch
        )

    def damaged(self, damage, *words):
        """After two epochs the newest checkpoint is damaged: the one before is used, and said."""
        place = self.new_place(self.by_epoch[1])
        damage(place / "run" / "checkpoints" / "epoch-2.npz")
        return self.resumed(place, *words, already=1)

    def all_damaged(self, damage):
        place = self.new_place(self.by_epoch[1])
        for path in (place / "run" / "checkpoints").glob("*.npz"):
            damage(path)
        return self.refused(place, 1, "run/checkpoints: no whole checkpoint")

    def full_disk(self, epoch):
        """No file may be larger than the checkpoint after an epoch."""
        place = self.new_place()
        path = self.by_epoch[epoch - 1] / "run" / "checkpoints" / f"epoch-{epoch}.npz"
        limit = ("sh", "-c", f'ulimit -f {path.stat().st_size // 512 + 2} && exec "$@"', "sh")
        name = f"run/checkpoints/epoch-{epoch + 1}.npz"
        words = (f"cannot write {name}: File too large", "--resume")
        good = self.refused(place, 1, *words, flags=FLAGS, prefix=limit)
        return good and self.resumed(place, already=epoch)

    def moved_away(self, leave_a_file):
        """During the second epoch the output directory goes, or a file takes its place."""
        place = self.new_place()
        with self.start(place, *FLAGS) as process:
            read_until(process, "Epoch 1/")
            (place / "run").rename(place / "elsewhere")
            if leave_a_file:
                (place / "run").write_text("mine")
            output, errors = process.communicate()
        reason = "Not a directory" if leave_a_file else "No such file or directory"
        good = process.returncode == 1 and len(errors.splitlines()) == 1
        good = good and "cannot write run/" in errors and f": {reason}; " in errors
        if leave_a_file:
            good = good and (place / "run").read_text() == "mine"
            (place / "run").unlink()
        (place / "elsewhere").rename(place / "run")
        good = verdict(good, place, process.returncode, output, errors)
        return good and self.resumed(place, already=1)

    def signalled(self, number, seconds):
        place = self.new_place()
        with self.start(place, *FLAGS, cold=True) as process:
            time.sleep(seconds)
            process.send_signal(number)
            began = time.perf_counter()
            output, errors = process.communicate()
        at_once = time.perf_counter() - began < AT_ONCE
        begun = (place / "run" / "config.json").exists()
        over = "--- Training completed! ---" in output
        if process.returncode == 128 + number:
            good = len(errors.splitlines()) == 1 and ("--resume run" in errors) == begun
        elif process.returncode == -number:  # by the system: during the imports, or at the end
            good = errors == "" and (over or not begun)
        else:
            good = (process.returncode, errors) == (0, "") and over
        good = verdict(good and at_once, place, process.returncode, output, errors)
        return good and self.resumed(place)

    def forged(self, change, status, *words):
        """A whole checkpoint that another program could have written."""
        place = self.new_place(self.by_epoch[1])
        forge(place / "run" / "checkpoints" / "epoch-2.npz", change)
        if status == 0:
            return self.resumed(place, *words, already=2)
        return self.refused(place, status, *words)

    def not_a_number(self, where):
        """In the second epoch; the first one's checkpoint stays, and is gone on from."""
        place = self.new_place(self.by_epoch[0])
        script = self.directory / f"nan_in_the_{where}.py"
        begin = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport grpo_mnist\n"
        script.write_text(begin + NOT_A_NUMBER[where] + "sys.exit(grpo_mnist.main())\n")
        words = ("epoch 2, seed 0: not finite: ", "actor.output.kernel", "loss")
        good = self.refused(place, 1, *words, program=(script,))
        return good and self.resumed(place, already=1)

    def second_run(self, epoch):
        """After an epoch of one, another in its directory is refused, and does not harm it."""
        place = self.new_place()
        with self.start(place, *FLAGS) as process:
            read_until(process, f"Epoch {epoch}/")
            process.send_signal(signal.SIGSTOP)
            good = all(
                self.refused(place, 2, "run ", flags=flags)
                for flags in (FLAGS, ("--resume", "run"))
            )
            process.send_signal(signal.SIGCONT)
            process.communicate()
        return good and process.returncode == 0 and outcome(place) == self.expected


def verdict(good, place, status, output, errors):
    """Hands good through, and shows what happened if it is not."""
    if not good:
        print(f"not as it should be: {place}: {status}\n{output}{errors}", flush=True)
    return good


def read_until(process, beginning):
    """Reads what a process prints up to a line that begins so."""
    for line in process.stdout:
        if line.startswith(beginning):
            return
    raise AssertionError(f"ended before {beginning}: {process.stderr.read()}")


def metrics_without_times(run):
    """The lines of metrics.jsonl, of which two runs that are the same must have the same."""
    times = {"seconds": None, "images_per_second": None}
    lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) | times for line in lines]


def outcome(place):
    """What two runs that are the same must agree in."""
    run = place / "run"
    if not (run / "summary.json").exists():
        return None
    may_differ = {"program_sha256": None, "resume": None}
    return {
        "params_sha256": json.loads((run / "summary.json").read_text())["params_sha256"],
        "metrics": metrics_without_times(run),
        "config": json.loads((run / "config.json").read_text()) | may_differ,
        "files": sorted(str(path.relative_to(place)) for path in place.rglob("*")),
    }


def forge(path, change):
    """Writes a checkpoint anew with its header or its arrays changed, digest included."""
    arrays = dict(np.load(path))
    header = json.loads(str(arrays.pop("header")))
    change(header, arrays)
    content = io.BytesIO()
    np.savez(content, header=json.dumps(header), **arrays)
    path.write_bytes(content.getvalue() + hashlib.sha256(content.getvalue()).digest())


def truncate(length):
    return lambda path: os.truncate(path, length)


def flip(bit):
    def damage(path):
        content = bytearray(path.read_bytes())
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)

    return damage


def newer_format(header, _):
    header["format"] += 1


def other_library(header, _):
    header["facts"]["versions"]["jax"] = "0.4.1"


def damages(size, truncations, flips):
    """(damage, what has to be said) for a file of that size."""
    said = "epoch-2.npz does not match its SHA-256"
    lengths = [size * i // truncations for i in range(truncations)]
    bits = random.Random(0).sample(range(8 * size), flips)
    return [
        *((truncate(length), said) for length in [*lengths[1:], size - 1]),
        (truncate(0), said),
        (os.unlink, "Resumed: 1 of 3 epochs are done"),
        *((flip(bit), said) for bit in bits),
    ]


def main():
    program_sha256 = hashlib.sha256(PROGRAM.read_bytes()).hexdigest()
    results = RESULTS / "faults.json"
    before = json.loads(results.read_text()) if results.exists() else {}
    done = before["rows"] if before.get("program_sha256") == program_sha256 else []
    done = {row["fault"]: row for row in done}
    rows = []
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(2) as pool:
        laboratory = Laboratory(directory)

        def try_all(fault, promise, try_one, *arguments):
            if fault not in done:
                outcomes = list(pool.map(try_one, *arguments))
                if None in outcomes:  # the end of what there is to try
                    outcomes = outcomes[: outcomes.index(None)]
                counts = {"tried": len(outcomes), "kept": sum(outcomes)}
                done[fault] = {"fault": fault, "promise": promise} | counts
            rows.append(done[fault])
            print(*done[fault].values(), sep=" | ", flush=True)
            facts = {"flags": " ".join(FLAGS), "program_sha256": program_sha256}
            write_results("faults", facts | {"rows": rows})

        try_everything(laboratory, try_all)


def try_everything(laboratory, try_all):
    """Calls try_all with a fault, the promise about it, a function, and the function's arguments.

    Each of the arguments is a sequence, with an item for each time that the fault is tried.
    """
    same = "resumed, the same result"
    moments = random.Random(1)
    kills, *signals = (
        [moments.uniform(0, laboratory.seconds) for _ in range(n)] for n in (50, 10, 10)
    )
    try_all("SIGKILL at a random moment", same, laboratory.killed, kills)
    for loss, fault in (
        ("nothing", "SIGKILL at the n-th write, fsync, rename or unlink, every n"),
        ("contents", "power cut there: contents not synced are lost"),
        ("all", "power cut there: names not synced are lost too"),
    ):
        try_all(fault, same, laboratory.crashed, range(1, 60), [loss] * 59)
    try_all("resumed after each epoch", same, laboratory.resumed_from, (1, 2, 3))
    size = (laboratory.by_epoch[1] / "run" / "checkpoints" / "epoch-2.npz").stat().st_size
    kinds = damages(size, truncations=16, flips=200)
    before = f"a notice; from the one before, {same}"
    for fault, some in (
        ("newest checkpoint cut short", kinds[:16]),
        ("newest checkpoint emptied", kinds[16:17]),
        ("newest checkpoint deleted", kinds[17:18]),
        ("one bit of the newest checkpoint flipped", kinds[18:]),
    ):
        breaks, words = zip(*some, strict=True)
        try_all(fault, before, laboratory.damaged, breaks, words)
    both = (truncate(99), flip(9))
    try_all("both checkpoints damaged", "one line, status 1", laboratory.all_damaged, both)
    stops = f"one line, status 1; {same}"
    try_all("disk full", stops, laboratory.full_disk, [1])
    try_all("output directory moved away", stops, laboratory.moved_away, [False])
    try_all("a file in its place", stops, laboratory.moved_away, [True])
    for number, seconds in zip((signal.SIGINT, signal.SIGTERM), signals, strict=True):
        fault = f"{number.name} at a random moment"
        promise = f"ends at once, status {128 + number}; {same}"
        try_all(fault, promise, laboratory.signalled, [number] * 10, seconds)
    newer = (newer_format,), (2,), ["has format 3, not 2"]
    promise = "one line with both, status 2"
    try_all("checkpoint of a newer format", promise, laboratory.forged, *newer)
    other = (other_library,), (0,), [f"jax was 0.4.1, is {library_versions()['jax']}"]
    promise = "a notice with both"
    try_all("checkpoint of another library version", promise, laboratory.forged, *other)
    for where in NOT_A_NUMBER:
        try_all(f"NaN in the {where}", stops, laboratory.not_a_number, [where])
    promise = "one line, status 2; the first is not disturbed"
    try_all("a second run in the directory", promise, laboratory.second_run, [1])


if __name__ == "__main__":
    main()
