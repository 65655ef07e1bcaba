"""A fence around somebody else's code: a process of its own that may compute, and do nothing else.

Of what Linux offers, this takes what it gets: namespaces (no network, no other process, a scratch folder of limited
size), Landlock (writing in the scratch folder alone, reading in what was named alone), limits on memory, files and
time. What is in force, `raise_fence` says. It is a fence against accidents, and against cheating as it is usual; it is
no virtual machine, and whoever lets strangers in from the street puts one around it.
"""

import ctypes, os, resource, signal, struct, sys
from pathlib import Path

NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
READ = 1 << 2 | 1 << 3  # files, folders
WRITE = 1 << 1 | sum(1 << k for k in range(4, 13))  # files, and making and removing all that there is
NEWER = {2: 1 << 13, 3: 1 << 14}  # since which version of Landlock: moving between folders, truncating
libc, LINUX = ctypes.CDLL(None, use_errno=True), sys.platform == "linux"


def apart():
    "Leave the machine's network, processes and mounts, where that is allowed: what of it was."
    if not LINUX:
        return []
    inside = f"{os.getuid()} {os.getuid()} 1", f"{os.getgid()} {os.getgid()} 1"
    for flags in 0, NEWUSER:
        if libc.unshare(NEWNET | NEWPID | NEWNS | NEWIPC | flags) == 0:
            if flags:
                Path("/proc/self/setgroups").write_text("deny")
                Path("/proc/self/uid_map").write_text(inside[0])
                Path("/proc/self/gid_map").write_text(inside[1])
            return ["no network", "no other processes"]
    return []


def small_disk(folder, size):
    "Memory of limited size where a folder was."
    return (
        libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 6, f"size={size}".encode()) == 0
    )  # no devices, no setuid


def landlock(readable, writable):
    "Reading beneath some folders alone, writing beneath others alone; no TCP, no signals to others. Where it is there."
    version = libc.syscall(444, None, 0, 1) if LINUX else 0
    if version < 1:
        return []
    write = WRITE | sum(bit for since, bit in NEWER.items() if version >= since)
    asked = struct.pack("QQQ", READ | write, 3, 3)[: 8 if version < 4 else 16 if version < 6 else 24]
    rules = libc.syscall(444, asked, len(asked), 0)
    for paths, rights in (readable, READ), (writable, READ | write):
        for path in paths:
            try:
                place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except OSError:
                continue
            only = rights if os.path.isdir(path) else rights & (1 << 1 | 1 << 2 | NEWER[3] * (version >= 3))
            libc.syscall(445, rules, 1, struct.pack("=Qi", only, place), 0)
            os.close(place)
    libc.prctl(38, 1, 0, 0, 0)  # no new privileges
    done = libc.syscall(446, rules, 0) == 0
    os.close(rules)
    return ["writes in its scratch folder alone", "reads no other's work"] * done


def raise_fence(scratch, readable, memory, seconds, born=print, disk=512 << 20):
    """Fence this process in for good, and tell with what. To be called in a process that was forked for that and has
    one thread; it goes on in a child of its own, whose number it tells `born`, and whose end it hands on."""
    said = apart()
    if said:
        libc.mount(None, b"/", None, 0x44000, None)  # mounts are private from here on
    small = said and small_disk(scratch, disk)
    shared = ["/dev/shm"] if said and small_disk("/dev/shm", disk) else []
    if child := os.fork():
        born(child)
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 255)
    limits = {resource.RLIMIT_FSIZE: disk, resource.RLIMIT_CORE: 0, resource.RLIMIT_CPU: int(seconds) + 1}
    if LINUX:
        libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # dies with its parent; and whatever it started, with it
        here = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limits[resource.RLIMIT_AS] = here + memory
    for what, most in limits.items():
        resource.setrlimit(what, (most, most))
    return [
        f"{memory >> 20} MiB",
        *said,
        *["a small disk"] * bool(small),
        *landlock(readable, [scratch, "/dev/null", *shared]),
    ]
