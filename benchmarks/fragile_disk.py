"""Runs the trainer on a disk that fails: the process kills itself at its n-th operation on a file.

    python benchmarks/fragile_disk.py PROGRAM N LOSS flags of the program ...

An operation is a write, fsync, rename or unlink below the working directory. A write stops halfway.
LOSS is what the failure takes with it:

    nothing    as when a process is killed: what the system was told, it keeps
    contents   as when the power goes: files whose content was not synced are empty
    all        and every new name, rename and unlink in a directory that was not synced is undone;
               a new directory there is gone with all that is in it
"""

import os
import pathlib
import runpy
import shutil
import signal
import sys


class FragileDisk:
    """Stands between the program and the operating system; forgets what was not synced."""

    def __init__(self, crash_at, loss):
        self.crash_at = crash_at
        self.loss = loss
        self.count = 0
        self.unsynced_files = set()  # by the names that they have now
        self.undo = []  # (directory, function), the latest last
        self.paths = {}  # by file descriptor
        self.system = {
            name: getattr(os, name) for name in ("open", "mkdir", "fsync", "replace", "unlink")
        }
        self.open_path = pathlib.Path.open

    def install(self):
        for name in self.system:
            setattr(os, name, getattr(self, name))
        disk = self
        pathlib.Path.open = lambda path, *arguments, **options: disk.open_file(
            path, *arguments, **options
        )

    def operation(self, halfway=lambda: None):
        self.count += 1
        if self.count == self.crash_at:
            halfway()
            if self.loss == "all":
                for _, undo in reversed(self.undo):
                    undo()
            if self.loss != "nothing":
                for path in filter(os.path.exists, self.unsynced_files):
                    os.truncate(path, 0)
            os.kill(os.getpid(), signal.SIGKILL)

    def open_file(self, path, mode="r", *arguments, **options):
        file = self.open_path(path, mode, *arguments, **options)
        if mode != "wb" or not is_ours(path):
            return file
        path = os.path.abspath(path)
        self.paths[file.fileno()] = path
        self.unsynced_files.add(path)
        self.on_crash(path, lambda: os.path.exists(path) and self.system["unlink"](path))
        return FragileFile(file, self)

    def open(self, path, *arguments, **options):
        descriptor = self.system["open"](path, *arguments, **options)
        self.paths[descriptor] = os.path.abspath(os.fspath(path))
        return descriptor

    def mkdir(self, path, *arguments, **options):
        self.system["mkdir"](path, *arguments, **options)
        if is_ours(path):
            path = os.path.abspath(path)
            self.on_crash(path, lambda: shutil.rmtree(path))

    def fsync(self, descriptor):
        path = self.paths[descriptor]
        self.operation()
        self.system["fsync"](descriptor)
        self.unsynced_files.discard(path)
        self.undo = [(directory, undo) for directory, undo in self.undo if directory != path]

    def replace(self, source, target):
        if not is_ours(target):
            return self.system["replace"](source, target)
        self.operation()
        source, target = os.path.abspath(source), os.path.abspath(target)
        backup = self.keep(target)
        self.system["replace"](source, target)
        if source in self.unsynced_files:
            self.unsynced_files.remove(source)
            self.unsynced_files.add(target)

        def undo():
            self.system["replace"](target, source)
            if backup:
                self.system["replace"](backup, target)

        self.on_crash(target, undo)

    def unlink(self, path, **options):
        if not is_ours(path) or not os.path.lexists(path):
            return self.system["unlink"](path, **options)
        self.operation()
        path = os.path.abspath(path)
        backup = self.keep(path)
        self.system["unlink"](path, **options)
        self.on_crash(path, lambda: self.system["replace"](backup, path))

    def on_crash(self, path, undo):
        self.undo.append((os.path.dirname(path), undo))

    def keep(self, path):
        """A second name, elsewhere, for a file that is about to lose its own."""
        if not os.path.exists(path):
            return None
        backup = os.path.abspath(f"{os.getcwd()}.lost/{self.count}")
        os.makedirs(os.path.dirname(backup), exist_ok=True)
        os.link(path, backup)
        return backup


class FragileFile:
    """A binary file whose writes are operations; it can do no more than the program asks of it."""

    def __init__(self, file, disk):
        self.file = file
        self.disk = disk
        self.flush, self.fileno = file.flush, file.fileno

    def write(self, chunk):
        def halfway():
            self.file.write(bytes(chunk)[: len(chunk) // 2])
            self.file.flush()

        self.disk.operation(halfway)
        return self.file.write(chunk)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


def is_ours(path):
    return os.path.abspath(os.fspath(path)).startswith(os.getcwd() + os.sep)


def main():
    program, crash_at, loss, *flags = sys.argv[1:]
    assert loss in ("nothing", "contents", "all")
    FragileDisk(int(crash_at), loss).install()
    sys.argv = [program, *flags]
    runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main()
