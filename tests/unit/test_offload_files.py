"""Files of the NVMe tier: they end with what holds them, whoever dies, and say what failed first, in bytes."""

from __future__ import annotations

import errno
import gc
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from shardwise.errors import StoreError
from shardwise.offload import drive, files
from shardwise.offload.files import PAGE, Files, take_space
from shardwise.offload.nvme import NvmeStore
from shardwise.ranks.lanes import Lanes
from shardwise.zero.engine import Faults


@pytest.fixture(params=["O_TMPFILE", "unlinked"])
def way(request, monkeypatch):
    """Both ways to a file without a name."""
    if request.param == "unlinked":
        monkeypatch.setattr(files.os, "O_TMPFILE", os.O_DIRECTORY)  # as a kernel without it says: EISDIR
    return request.param


@pytest.fixture
def store(tmp_path):
    made = NvmeStore(tmp_path / "drive", Lanes(torch.device("cpu")), 3)
    yield made
    made.close()


def full(store, numel, value=1.0, name="weights"):
    slab = store.allocate(numel, torch.float32, name)
    slab.put(torch.full((numel,), value)).enqueued()
    return slab


def failing(code, calls=0):
    """A preadv or pwritev that raises after so many calls."""
    left = [calls]

    def call(descriptor, buffers, offset):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(code, os.strerror(code))
        return os.pwritev(descriptor, buffers, offset)

    return call


# Their life.


def test_a_slab_that_nobody_holds_gives_its_file_back(store, way):
    kept = full(store, 5000)
    for value in range(20):
        full(store, 300_000, value)
        store.drain()
    gc.collect()
    assert store.open_files == 1
    assert store.nbytes < 200_000
    assert torch.equal(kept.read_part(0, 5000), torch.ones(5000))
    assert list(store.drives[0].folder.iterdir()) == []


def test_a_slab_that_is_dropped_while_it_is_written_and_read_lives_until_that_is_over(store, monkeypatch):
    def slow(call):
        def slowly(*args):
            time.sleep(0.02)
            return call(*args)

        return slowly

    monkeypatch.setattr(drive, "write_at", slow(drive.write_at))
    monkeypatch.setattr(drive, "read_at", slow(drive.read_at))
    for value in range(5):
        out = torch.empty(70_000)
        slab = full(store, 70_000, value)
        store.drain()
        slab.put(torch.full((70_000,), value + 0.5))
        arrival = slab.fetch(out)
        descriptor = slab.files[0].descriptor
        del slab
        os.fstat(descriptor)
        arrival.enqueued()
        assert torch.equal(out, torch.full((70_000,), value + 0.5))
        store.drain()
        del arrival
    deadline = time.monotonic() + 5  # a thread lets go of its last task a moment after that is done
    while store.open_files and time.monotonic() < deadline:
        time.sleep(0.01)
    assert store.open_files == 0


def test_what_ends_closes_every_file_and_no_other(tmp_path):
    made = Files(tmp_path)
    held = [made.make() for _ in range(3)]
    numbers = [file.descriptor for file in held]
    made.close()
    others = [os.open(tmp_path, os.O_RDONLY) for _ in range(3)]  # they get the same numbers
    assert set(others) == set(numbers)
    del held
    gc.collect()
    made.close()
    for descriptor in others:
        os.close(descriptor)  # raises, had it been closed as one of ours


def test_a_forked_child_holds_nothing_and_takes_nothing_from_its_parent(store):
    slab = full(store, 5000)
    store.drain()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = 0 if store.open_files == 0 and not held_by("self", store.drives[0].folder) else 2
            store.close()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert torch.equal(slab.read_part(0, 5000), torch.ones(5000))


def held_by(pid, folder):
    """What a process has open below `folder`."""
    found = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.append(os.readlink(link))
        except OSError:
            continue
    return [name for name in found if name.startswith(str(folder))]


# Many that come and die at random in one directory, each with children that inherit what it has open. What lives must find its
# own bytes, and what died must leave nothing. The module is loaded by itself: a process is there in a millisecond.
CROWD = """
    import importlib.util, mmap, os, random, signal, sys, time
    spec = importlib.util.spec_from_file_location("files", sys.argv[1])
    files = importlib.util.module_from_spec(spec); spec.loader.exec_module(files)
    folder, deadline = files.Path(sys.argv[2]), time.monotonic() + float(sys.argv[3])
    if sys.argv[4] == "unlinked":
        os.O_TMPFILE = os.O_DIRECTORY

    def page(byte):
        made = mmap.mmap(-1, 16 * files.PAGE)
        made.write(bytes([byte]) * len(made))
        return made

    def live():
        mine = files.Files(folder)
        held = []
        while True:
            file, byte = mine.make(), random.randrange(256)
            files.take_space(file, 16 * files.PAGE)
            os.pwrite(file.descriptor, page(byte), 0)
            held = [*held, (file, byte)][-5:]
            found = page(0)
            for file, byte in held:
                os.preadv(file.descriptor, [found], 0)
                if found[:] != bytes([byte]) * len(found):
                    os._exit(7)
            if random.random() < 0.2 and os.fork() == 0:
                os.setpgid(0, 0)
                time.sleep(60)

    living, bad = {}, 0
    while time.monotonic() < deadline:
        if len(living) < 6:
            pid = os.fork()
            if pid == 0:
                try:
                    live()
                finally:
                    os._exit(8)
            living[pid] = None
        else:
            pid = random.choice(list(living))
            os.kill(pid, random.choice([signal.SIGKILL, signal.SIGTERM]))
            bad += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) not in (-9, -15)
            del living[pid]
        time.sleep(random.random() * 0.02)
    for pid in living:
        os.kill(pid, signal.SIGKILL)
        bad += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) not in (-9, -15)
    with open(sys.argv[5], "w") as file:
        file.write(str(bad))
"""


def crowd(base, seconds, kind):
    folder, verdict = base / "drive", base / "verdict"  # the verdict's path is what its processes are known by
    command = [
        sys.executable,
        "-c",
        textwrap.dedent(CROWD),
        files.__file__,
        str(folder),
        str(seconds),
        kind,
        str(verdict),
    ]
    with open(base / "log", "wb") as log:  # no pipe: the children that stay would keep it open
        code = subprocess.run(command, stdout=log, stderr=log, timeout=seconds + 60, check=False).returncode
    orphans = [int(process.name) for process in Path("/proc").glob("[0-9]*") if str(verdict) in _command(process)]
    held = [name for pid in orphans for name in held_by(pid, folder)]
    for pid in orphans:
        os.kill(pid, signal.SIGKILL)
    assert (code, verdict.read_text()) == (0, "0"), (base / "log").read_text()[-2000:]
    assert orphans, "children outlived the ones that were killed"
    assert held == [], "a child that outlives a rank keeps nothing of the drive"
    if kind == "unlinked":  # a kill between the file's beginning and the end of its name
        assert all(path.stat().st_size == 0 for path in folder.iterdir())
        Files(folder).close()
    assert list(folder.iterdir()) == [], "what died left nothing, named or not"


def _command(process):
    try:
        return (process / "cmdline").read_text()
    except OSError:
        return ""


@pytest.mark.parametrize("kind", ["O_TMPFILE", "unlinked"])
def test_runs_that_die_at_random_leave_nothing_and_harm_nobody(tmp_path, kind):
    crowd(tmp_path, 2.0, kind)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["O_TMPFILE", "unlinked"])
def test_many_runs_that_die_at_random_leave_nothing_and_harm_nobody(tmp_path, kind):
    crowd(tmp_path, 60.0, kind)


# What they say.


def test_a_full_drive_is_told_in_bytes_and_stays_the_cause(store, monkeypatch):
    def no_space(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", no_space)
    slab = store.allocate(5, torch.float32, "first.weight")
    words = r"rank 3 could not take 4,096 bytes for first\.weight in .*drive: No space left on device\. Give nvme_path"
    with pytest.raises(StoreError, match=words) as told:
        store.drain()
    assert isinstance(told.value.__cause__, OSError)
    for _ in range(2):
        slab.put(torch.ones(5)).enqueued()
        with pytest.raises(StoreError, match=words):
            store.drain()
        with pytest.raises(StoreError, match=words):
            slab.read_part(0, 5)
    store.drain()


def test_bytes_that_could_not_be_written_say_why_until_they_are_written_anew(store, monkeypatch):
    slab = full(store, 10_000)
    store.drain()
    monkeypatch.setattr(drive, "write_at", failing(errno.EDQUOT))
    slab.put(torch.zeros(2048), 4096).enqueued()
    words = r"rank 3 could not write 8,192 bytes of weights in .*: Disk quota exceeded"
    with pytest.raises(StoreError, match=words):
        store.drain()
    monkeypatch.undo()
    for _ in range(2):  # for good, and not once
        with pytest.raises(StoreError, match=words):
            slab.read_part(0, 10_000)
    assert torch.equal(slab.read_part(0, 4096), torch.ones(4096)), "the rest of it is there"
    store.drain()
    slab.put(torch.full((2048,), 2.0), 4096).enqueued()
    store.drain()
    assert torch.equal(slab.read_part(4096, 2048), torch.full((2048,), 2.0))


def test_of_several_failures_the_first_is_told_and_told_once(store, monkeypatch):
    first, second = full(store, 5120, name="first"), full(store, 5120, name="second")
    store.drain()
    monkeypatch.setattr(drive, "write_at", failing(errno.ENOSPC))
    slab_parts = first.put(torch.zeros(5120))
    first.writing[-1].future.exception()
    monkeypatch.setattr(drive, "read_at", failing(errno.EIO))
    with pytest.raises(StoreError, match=r"could not write 20,480 bytes of first in .*No space left"):
        second.fetch(torch.empty(5120)).enqueued()
    assert slab_parts.enqueued() is None
    with pytest.raises(StoreError, match=r"could not write 20,480 bytes of first in .*No space left"):
        store.drain()
    with pytest.raises(StoreError, match=r"could not read 20,480 bytes of second in .*another drive"):
        second.read_part(0, 5120)
    store.drain()


def test_a_call_that_stops_short_goes_on_and_has_the_reason_of_the_next(store, monkeypatch):
    monkeypatch.setattr(drive, "write_at", lambda d, b, o: os.pwritev(d, [b[0][:PAGE]], o))
    monkeypatch.setattr(drive, "read_at", lambda d, b, o: os.preadv(d, [b[0][:PAGE]], o))
    slab = full(store, 9216, 4.0)
    store.drain()
    assert torch.equal(slab.read_part(0, 9216), torch.full((9216,), 4.0))
    calls = [0]

    def then_full(descriptor, buffers, offset):
        calls[0] += 1
        if calls[0] > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return os.pwritev(descriptor, [buffers[0][:PAGE]], offset)

    monkeypatch.setattr(drive, "write_at", then_full)
    slab.put(torch.zeros(9216))
    with pytest.raises(StoreError, match=r"could not write 36,864 bytes of weights in .*No space left"):
        store.drain()
    monkeypatch.undo()
    slab.put(torch.zeros(9216))
    store.drain()
    monkeypatch.setattr(drive, "read_at", lambda d, b, o: 0)
    with pytest.raises(StoreError, match=r"read 36,864 bytes of weights in .*ends after 0 of them .*last checkpoint"):
        slab.read_part(0, 9216)
    monkeypatch.setattr(drive, "write_at", lambda d, b, o: 0)
    slab.put(torch.zeros(9216))
    with pytest.raises(StoreError, match=r"write 36,864 bytes of weights in .*it took 0 of them and no more"):
        store.drain()


def test_too_many_open_files_are_not_called_a_full_drive(store, monkeypatch):
    def too_many(*_):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(store.drives[0].files, "make", too_many)
    store.allocate(5, torch.float32, "weights")
    with pytest.raises(StoreError, match=r"Too many open files\. Raise the limit of open files"):
        store.drain()


def test_a_directory_that_cannot_be_used_is_one_error(tmp_path, monkeypatch):
    lanes = Lanes(torch.device("cpu"))
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"rank 0 could not put files into .*file: File exists\. Give nvme_path"):
        NvmeStore(tmp_path / "file", lanes, 0)
    with pytest.raises(StoreError, match="rank 0 could not put files into /proc/nowhere"):
        NvmeStore("/proc/nowhere", lanes, 0)
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    with pytest.raises(StoreError, match="its file system does not keep open files without a name"):
        NvmeStore(tmp_path, lanes, 0)


def test_a_file_system_without_preallocation_is_used_without(tmp_path, monkeypatch):
    def unknown(*_):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", unknown)
    file = Files(tmp_path).make()
    take_space(file, 8 * PAGE)
    assert os.fstat(file.descriptor).st_size == 8 * PAGE


class OneRank:
    """Ranks that remember what they were to agree on."""

    def agree(self, error):
        self.asked = True
        if error is not None:
            raise error


def test_ranks_are_told_what_failed_first_and_not_what_was_noted_first(store, monkeypatch):
    slab, other = full(store, 5120, name="first"), full(store, 5120, name="second")
    store.drain()
    faults = Faults(OneRank(), (store,))
    faults.agree()
    monkeypatch.setattr(drive, "write_at", failing(errno.ENOSPC))
    slab.put(torch.zeros(5120))
    slab.writing[-1].future.exception()  # nobody has waited for it yet
    faults.note(StoreError("a read of another slab"))
    with pytest.raises(StoreError, match="could not write 20,480 bytes of first"):
        faults.agree()
    faults.agree()
    store.close()
    del other


def test_a_failure_without_a_drive_is_not_lost():
    ranks = OneRank()
    faults = Faults(ranks)
    faults.note(StoreError("host memory"))
    with pytest.raises(StoreError, match="host memory"):
        faults.agree()
    faults.agree()
    assert not hasattr(ranks, "asked"), "no message where no drive is used"


def test_a_part_that_was_put_is_read_after_a_file_was_dropped(store):
    """Numbers of descriptors come again: a slab reads its own file."""
    slabs = [full(store, 2048, float(value)) for value in range(4)]
    del slabs[1]
    slabs.append(full(store, 2048, 9.0))
    slabs[0].write_part(100, torch.full((50,), 5.0))
    store.drain()
    assert [slab.read_part(0, 1).item() for slab in slabs] == [0.0, 2.0, 3.0, 9.0]
