"Several processes run each test once, say of each what one process says, and end when one of them dies."

import os, re, subprocess, sys
from pathlib import Path

import pytest

FILE = """
import os, sys, warnings
from pathlib import Path
import pytest
note = lambda what: print(what, os.getpid(), file=open("notes", "a"))

@pytest.fixture(scope="session", autouse=True)
def shared(tmp_path_factory):
    yield tmp_path_factory.mktemp("own")
    note("end")

@pytest.mark.parametrize("i", range(20))
def test_some(i, shared, tmp_path):
    note(f"{__name__}-{i}")
    print("said by", i)
    if i == 3: warnings.warn("what was said")
    if i == 5: pytest.skip("not here")
    assert i != 7, "seven"
"""


@pytest.fixture
def ran(tmp_path):
    "Files of tests and options → exit status, what pytest says, and lines of (test, process)."

    def run(files, *options):
        for name, text in files.items():
            (tmp_path / f"test_{name}.py").write_text(text, encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "workers", "-p", "no:cacheprovider", *options]
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout, [l.split() for l in (tmp_path / "notes").read_text().splitlines()]

    return run


def test_what_three_processes_say_is_what_one_says(ran, tmp_path):
    files = {"a": FILE, "b": FILE, "c": "def test_alone(): pass"}
    said = {}
    for n in 0, 3:
        code, out, notes = ran(files, f"--workers={n}")
        (tmp_path / "notes").unlink()
        tests = sorted(name for name, _ in notes if name != "end")
        failures = sorted(re.findall(r"^FAILED (.*)|^said by (\d+)$", out, re.M))
        said[n] = code, tests, failures, re.findall(r"\d+ (?:passed|failed|skipped|warnings)", out)
        of = lambda ends: {process for name, process in notes if (name == "end") == ends}
        assert of(True) == of(False) and len(of(True)) == (n or 1)  # what tests of a process share ends with it
    assert said[3] == said[0] and len(said[0][1]) == 40
    assert said[0][3] == ["2 failed", "37 passed", "2 skipped", "2 warnings"] and said[0][0] == 1


def test_a_process_that_dies_is_a_failure_of_its_test(ran):
    code, out, notes = ran({"a": FILE, "b": FILE.replace("pytest.skip", "os._exit(3) or pytest.skip")}, "--workers=2")
    assert code == 1 and re.search(r"FAILED test_b.py::test_some\[5\] - the process that ran it", out)
    assert {name for name, _ in notes} >= {f"test_{f}-{i}" for f in "ab" for i in range(20) if (f, i) != ("b", 6)}


def test_the_first_failure_ends_it(ran):
    code, out, notes = ran({"a": FILE, "b": FILE}, "--workers=2", "-x")
    assert code and re.search("stopping after [12] failures", out) and len(notes) < 38
