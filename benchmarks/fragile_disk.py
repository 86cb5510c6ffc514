"""Runs the trainer on a disk that fails: the process kills itself at its n-th operation on a file.

    python benchmarks/fragile_disk.py N LOSS PROGRAM flags of the program ...

An operation is a write, fsync, rename or unlink below the working directory, which must be empty
at first. A write, which comes before the fsync of a file, stops halfway. LOSS is nothing, as when
a process is killed; contents, as when the power goes: files that were not synced are empty; or
all: a directory also has the names that it had when it was last synced, or none.
"""

import os
import runpy
import shutil
import signal
import sys
from functools import partial
from pathlib import Path


class FragileDisk:
    """Stands between the program and the operating system, and knows what was synced."""

    def __init__(self, crash_at, loss):
        self.operations_left, self.loss = crash_at, loss
        self.synced = {}  # by file: its content; by directory: such contents, None for directories

    def fsync(self, system_fsync, descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.is_file():
            self.operation(half_written=path)
        self.operation()
        system_fsync(descriptor)
        if path.is_file():
            self.synced[path] = path.read_bytes()
        else:
            inside = {each: self.synced.get(each, b"") for each in path.iterdir()}
            self.synced[path] = inside | {each: None for each in inside if each.is_dir()}

    def change_name(self, system_change, old, *new, **options):
        if (path := Path(old).absolute()).is_relative_to(Path.cwd()):
            self.operation()
            content = self.synced.pop(path, b"")
            self.synced |= {Path(path).absolute(): content for path in new}
        system_change(old, *new, **options)

    def operation(self, half_written=None):
        self.operations_left -= 1
        if self.operations_left == 0:
            if half_written:
                os.truncate(half_written, half_written.stat().st_size // 2)
            place = Path.cwd()
            if self.loss == "contents":
                for path in filter(Path.is_file, place.rglob("*")):
                    path.write_bytes(self.synced.get(path, b""))
            if self.loss == "all":
                shutil.rmtree(place)
                self.restore(place)
            signal.raise_signal(signal.SIGKILL)

    def restore(self, directory):
        directory.mkdir()
        for path, content in self.synced.get(directory, {}).items():
            if content is None:
                self.restore(path)
            else:
                path.write_bytes(content)


def main():
    crash_at, loss, *sys.argv = sys.argv[1:]
    disk = FragileDisk(int(crash_at), loss)
    os.fsync = partial(disk.fsync, os.fsync)
    os.replace = partial(disk.change_name, os.replace)
    os.unlink = partial(disk.change_name, os.unlink)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
