"""Runs the trainer on a disk that fails: the process kills itself at its n-th operation on a file.

    python benchmarks/fragile_disk.py N LOSS PROGRAM flags of the program ...

An operation is a write, fsync, rename or unlink below the working directory, which must be empty
at first. A write stops halfway. LOSS is what the failure takes with it:

    nothing    as when a process is killed: what the system was told, it keeps
    contents   as when the power goes: files whose content was not synced are empty
    all        and a directory has the names that it had when it was last synced, or none
"""

import io
import os
import pathlib
import runpy
import shutil
import signal
import stat
import sys


class FragileDisk:
    """Stands between the program and the operating system; forgets what was not synced."""

    def __init__(self, crash_at, loss):
        self.crash_at = crash_at
        self.loss = loss
        self.count = 0
        self.synced_files = set()  # Files and directories are known by their inodes.
        self.synced_names = {}  # {name: inode} by directory
        self.kept = pathlib.Path(f"{os.getcwd()}.kept")  # Second names of files with synced names.
        self.system = {name: getattr(os, name) for name in ("fsync", "replace", "unlink")}
        self.open_path = pathlib.Path.open

    def install(self):
        self.kept.mkdir()
        for name in self.system:
            setattr(os, name, getattr(self, name))
        pathlib.Path.open = lambda path, *rest, **options: self.open(path, *rest, **options)

    def operation(self, halfway=lambda: None):
        self.count += 1
        if self.count == self.crash_at:
            halfway()
            self.crash()

    def crash(self):
        if self.loss == "all":
            self.restore_names(pathlib.Path.cwd())
        if self.loss != "nothing":
            for path in pathlib.Path.cwd().rglob("*"):
                if path.is_file() and path.stat().st_ino not in self.synced_files:
                    os.truncate(path, 0)
        os.kill(os.getpid(), signal.SIGKILL)

    def restore_names(self, directory):
        names = self.synced_names.get(directory.stat().st_ino, {})
        for path in directory.iterdir():
            same = path.stat().st_ino == names.get(path.name)
            if path.is_dir() and same:
                self.restore_names(path)
            elif path.is_dir():
                shutil.rmtree(path)
            elif not same:
                self.system["unlink"](path)
        for name, inode in names.items():
            if not (directory / name).exists():
                os.link(self.kept / str(inode), directory / name)

    def open(self, path, mode="r", *rest, **options):
        if mode == "wb" and is_ours(path):
            return FragileFile(path, self)
        return self.open_path(path, mode, *rest, **options)

    def fsync(self, descriptor):
        self.operation()
        self.system["fsync"](descriptor)
        status = os.fstat(descriptor)
        if not stat.S_ISDIR(status.st_mode):
            self.synced_files.add(status.st_ino)
            return
        entries = list(os.scandir(descriptor))
        self.synced_names[status.st_ino] = {entry.name: entry.inode() for entry in entries}
        for entry in entries:
            kept = self.kept / str(entry.inode())
            if entry.is_file() and not kept.exists():
                os.link(entry.name, kept, src_dir_fd=descriptor)

    def replace(self, source, target):
        if is_ours(target):
            self.operation()
        self.system["replace"](source, target)

    def unlink(self, path, **options):
        if is_ours(path) and os.path.lexists(path):
            self.operation()
        self.system["unlink"](path, **options)


class FragileFile(io.BufferedWriter):
    """A new file whose writes are operations of a disk."""

    def __init__(self, path, disk):
        super().__init__(io.FileIO(path, "w"))
        self.disk = disk

    def write(self, chunk):
        def halfway():
            super(FragileFile, self).write(bytes(chunk)[: len(chunk) // 2])
            self.flush()

        self.disk.operation(halfway)
        self.disk.synced_files.discard(os.fstat(self.fileno()).st_ino)
        return super().write(chunk)


def is_ours(path):
    return os.path.abspath(os.fspath(path)).startswith(os.getcwd() + os.sep)


def main():
    crash_at, loss, *sys.argv = sys.argv[1:]
    assert loss in ("nothing", "contents", "all")
    FragileDisk(int(crash_at), loss).install()
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
