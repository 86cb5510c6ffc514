"""Runs the trainer on a disk that fails: the process kills itself at its n-th operation on a file.

    python benchmarks/fragile_disk.py N LOSS PROGRAM flags of the program ...

An operation is a write, fsync, rename or unlink below the working directory, which must be empty
at first. A write, which comes before the fsync of a file, stops halfway. LOSS is what the failure
takes with it:

    nothing    as when a process is killed: what the system was told, it keeps
    contents   as when the power goes: files whose content was not synced are empty
    all        and a directory has the names that it had when it was last synced, or none
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
        self.operations_left = crash_at
        self.loss = loss
        self.contents = {}  # by file
        self.names = {}  # by directory: {path: the content of the file, None for a directory}

    def fsync(self, system_fsync, descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.is_file():
            self.operation(half_written=path)
        self.operation()
        system_fsync(descriptor)
        if path.is_file():
            self.contents[path] = path.read_bytes()
        else:
            self.sync_names(path)

    def sync_names(self, directory):
        names = {path: self.contents.get(path, b"") for path in directory.iterdir()}
        self.names[directory] = names | {path: None for path in names if path.is_dir()}

    def change_name(self, system_change, old, *new, **options):
        if (path := Path(old).absolute()).is_relative_to(Path.cwd()):
            self.operation()
            content = self.contents.pop(path, b"")
            self.contents |= {Path(path).absolute(): content for path in new}
        system_change(old, *new, **options)

    def operation(self, half_written=None):
        self.operations_left -= 1
        if self.operations_left == 0:
            if half_written:
                os.truncate(half_written, half_written.stat().st_size // 2)
            if self.loss == "contents":
                for directory, _, _ in os.walk(Path.cwd()):
                    self.sync_names(Path(directory))
            if self.loss != "nothing":
                for path in Path.cwd().iterdir():
                    shutil.rmtree(path)
                self.restore(Path.cwd())
            os.kill(os.getpid(), signal.SIGKILL)

    def restore(self, directory):
        directory.mkdir(exist_ok=True)
        for path, content in self.names.get(directory, {}).items():
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
