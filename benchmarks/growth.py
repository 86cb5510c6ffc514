"""How the time of an epoch grows: with the answers, the batch, the network, and the seeds.

    python benchmarks/growth.py --data-dir DIR

One thing grows at a time, everything else being as by default. Each size is a process of its own
that runs an epoch of MNIST when told to; the sizes of a kind take turns, and the first round is not
counted. The width of the hidden layers is an option of this benchmark alone. On a GPU the seeds go
up to 1,024. Writes results/growth.json and growth.png.
"""

import argparse
import json
import math
from pathlib import Path

from common import (
    RESULTS,
    describe_device,
    grpo_mnist,
    prepare_ours,
    spread,
    start_worker,
    take_turn,
    work,
    write_results,
)
from flax import nnx

SIZES = {
    "num_generations": (1, 2, 4, 8, 16, 32, 64),
    "batch_size": (256, 512, 1024, 2048, 4096, 8192, 16384),
    "width": (32, 64, 128, 256, 512, 1024),
    "num_seeds": (1, 2, 4, 8, 16),
}
SEEDS_ON_A_GPU = (1, 4, 16, 64, 256, 1024)
LABELS = {
    "num_generations": "answers per image, G",
    "batch_size": "images per step, B",
    "width": "width of the hidden layers",
    "num_seeds": "seeds",
}
EPOCHS = 100  # more than are run, for the schedule of the learning rate


def widen(width):
    """Gives the networks that are made from now on hidden layers of another width."""

    def __init__(self, in_features, out_features, *, rngs):
        self.hidden_1 = nnx.Linear(in_features, width, rngs=rngs)
        self.hidden_2 = nnx.Linear(width, width, rngs=rngs)
        self.output = nnx.Linear(width, out_features, rngs=rngs)

    grpo_mnist.Network.__init__ = __init__


def measure(kind, sizes, repeats, data_dir):
    """A row for each size, and the slope of the time over the sizes, in powers."""
    workers = {
        size: start_worker([__file__, "--data-dir", str(data_dir), "--worker", kind, str(size)])
        for size in sizes
    }
    seconds = {size: [] for size in sizes}
    for _ in range(repeats + 1):
        for size, worker in workers.items():
            seconds[size].append(take_turn(worker)[0])
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    rows = []
    for size, taken in seconds.items():
        seeds, batch = (size if kind == name else 1 for name in ("num_seeds", "batch_size"))
        batch = batch if kind == "batch_size" else grpo_mnist.Config().batch_size
        images = seeds * (60_000 // batch) * batch
        rows.append(
            {
                "size": size,
                "images": images,
                "epoch_seconds": spread(taken[1:]),
                "images_per_second": spread([images / each for each in taken[1:]]),
            }
        )
    return {"rows": rows}


def slopes(rows, per_image):
    """The exponents p of time ~ size ** p: over all sizes, and over the last doubling or so.

    The time of an epoch; or that of an image, since epochs of large batches leave more images over.
    """

    def exponent(one, other):
        times = [
            row["epoch_seconds"]["median"] / (row["images"] if per_image else 1)
            for row in (one, other)
        ]
        return math.log(times[1] / times[0]) / math.log(other["size"] / one["size"])

    return {"overall": exponent(rows[0], rows[-1]), "at_the_end": exponent(rows[-2], rows[-1])}


def draw(results):
    """The figure, readable on a light and on a dark page: it brings its own white ground."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), dpi=120, layout="constrained")
    panels = figure.subplots(1, 4, sharey=True)
    for axes, (kind, label) in zip(panels, LABELS.items(), strict=True):
        rows = results["growth"][kind]["rows"]
        sizes = [row["size"] for row in rows]
        times = [row["epoch_seconds"] for row in rows]
        median = [time["median"] for time in times]
        low = [time["median"] - time["min"] for time in times]
        high = [time["max"] - time["median"] for time in times]
        axes.errorbar(sizes, median, yerr=(low, high), fmt="o-", capsize=2)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sizes, [str(size) for size in sizes], rotation=45, fontsize=8)
        axes.set_xlabel(label)
        axes.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("seconds per epoch")
    n = results["growth"]["num_seeds"]["rows"][0]["epoch_seconds"]["n"]
    figure.suptitle(f"{results['device']}, {results['cores']} cores; median and range of {n}")
    figure.savefig(RESULTS / "growth.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--draw", action="store_true", help="only the figure, from the results")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        kind, size = options.worker[0], int(options.worker[1])
        if kind == "width":
            widen(size)
        changes = {} if kind == "width" else {kind: size}
        dataset = grpo_mnist.load_dataset("mnist", options.data_dir)
        work(prepare_ours(dataset, grpo_mnist.Config(num_epochs=EPOCHS, **changes)))
        return
    if not options.draw:
        device = describe_device()
        growth = {}
        for kind, sizes in SIZES.items():
            if kind == "num_seeds" and not device.endswith("cpu"):
                sizes = SEEDS_ON_A_GPU
            growth[kind] = measure(kind, sizes, options.repeats, options.data_dir.resolve())
            for row in growth[kind]["rows"]:
                print(kind, row["size"], row["epoch_seconds"], flush=True)
            growth[kind]["slopes"] = slopes(growth[kind]["rows"], kind == "batch_size")
            print(kind, growth[kind]["slopes"], flush=True)
        write_results("growth", {"device": device, "growth": growth})
    draw(json.loads((RESULTS / "growth.json").read_text()))


if __name__ == "__main__":
    main()
