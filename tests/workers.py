"""Tests in several processes, which are copies of one: it has imported all that they need, and collected them, once.

    pytest --workers 4 tests

Each process takes a file of tests, the first ones first; when there are no more files, half of what is left of another
process's. So what the tests of a file share is made once, but at the end."""

import contextlib, itertools, os, sys, traceback, warnings
from multiprocessing.connection import Pipe, wait

import pytest


def pytest_addoption(parser):
    parser.addoption("--workers", type=int, default=0, metavar="N", help="share the tests among N processes")


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    n = session.config.option.workers
    if not n or session.config.option.collectonly or session.testsfailed:
        return None  # as ever
    session.config._tmp_path_factory.getbasetemp()  # one folder for all
    Team(session).run(n)
    return True


class Team:
    "The process that collected the tests: it hands them out, and hears what became of them."

    def __init__(self, session):
        self.session, self.hook, self.items = session, session.config.hook, session.items
        begins = [i for i, item in enumerate(self.items) if not i or item.path != self.items[i - 1].path]
        self.files = [range(a, b) for a, b in zip(begins, [*begins[1:], len(self.items)])][::-1]
        self.left, self.running = {}, {}  # pipe → tests that are its own, and tests that it has been given, in turn
        self.told = set()  # who knows that there are no more

    def run(self, n):
        processes = []
        for _ in range(min(n, len(self.items))):
            here, there = Pipe()
            sys.stdout.flush()
            if not (process := os.fork()):
                for pipe in (here, *self.running):  # those of the others end with them
                    pipe.close()
                work(self.session, there)
            there.close()
            processes.append(process)
            self.left[here], self.running[here] = range(0), []
            self.give(here), self.give(here)  # a test, and the one that comes after it
        try:
            while self.running:
                for pipe in wait(self.running):
                    self.hear(pipe)
        finally:
            for pipe in self.running:  # who waits for a test ends
                pipe.close()
            for process in processes:
                os.waitpid(process, 0)
        for number in itertools.chain(*self.files):
            if not self.session.shouldfail:
                self.fail(number, "no process was left to run it")
        if self.session.shouldfail:
            raise self.session.Failed(self.session.shouldfail)

    def give(self, pipe):
        "Another test, or none when there are none left."
        if pipe in self.told:
            return
        if not self.left[pipe]:
            most = max(self.left, key=lambda p: len(self.left[p]))
            if self.files:
                self.left[pipe] = self.files.pop()
            elif some := self.left[most]:
                self.left[most], self.left[pipe] = some[: len(some) // 2], some[len(some) // 2 :]
        number = None
        if self.left[pipe] and not self.session.shouldfail:
            number, self.left[pipe] = self.left[pipe][0], self.left[pipe][1:]
            self.running[pipe].append(number)
        else:
            self.told.add(pipe)
        with contextlib.suppress(ConnectionError):  # it has ended, as will be heard
            pipe.send(number)

    def hear(self, pipe):
        "What a process says of the test that it has run."
        try:
            reports, said = pipe.recv()
        except (EOFError, ConnectionError):
            return self.leave(pipe)
        for (text, kind, *place), where in said:
            kind = type(kind, (Warning,), {})
            warning = warnings.WarningMessage(kind(text), kind, *place)
            self.hook.pytest_warning_recorded.call_historic(kwargs=where | {"warning_message": warning})
        self.report(self.running[pipe].pop(0), reports)
        self.give(pipe)

    def report(self, number, reports):
        item = self.items[number]
        self.hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for data in reports:
            report = self.hook.pytest_report_from_serializable(config=self.session.config, data=data)
            self.hook.pytest_runtest_logreport(report=report)
        self.hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)

    def leave(self, pipe):
        "A process has ended: with a test in its hands that test is a failure, and the others have its tests."
        for number in self.running.pop(pipe):
            self.fail(number, "the process that ran it, or was to, has ended")
        if left := self.left.pop(pipe):
            self.files.append(left)

    def fail(self, number, why):
        item = self.items[number]
        report = pytest.TestReport(item.nodeid, item.location, {}, "failed", why, "call")
        self.report(number, [self.hook.pytest_report_to_serializable(config=self.session.config, report=report)])


def work(session, pipe):
    "A copy of the process runs what it is given, and ends."
    config, code = session.config, 1
    try:
        config.pluginmanager.unregister(name="terminalreporter")
        config.pluginmanager.register(notes := Notes(config))
        notes.taken()  # what was said before belongs to the other
        capture = config.pluginmanager.getplugin("capturemanager")
        capture.stop_global_capturing()  # into files that the copies have in common
        capture.start_global_capturing()
        capture.suspend_global_capture()
        now = pipe.recv()
        then = pipe.recv() if now is not None else None
        while now is not None:
            item, after = session.items[now], None if then is None else session.items[then]
            config.hook.pytest_runtest_protocol(item=item, nextitem=after)
            pipe.send(notes.taken())
            now, then = then, pipe.recv() if then is not None else None
        code = 0
    except BaseException:
        traceback.print_exc()
        session._setupstate.teardown_exact(None)  # browsers and servers end
    finally:
        os._exit(code)


class Notes:
    "What a process has to say of a test."

    def __init__(self, config):
        self.config, self.reports, self.warnings = config, [], []

    def taken(self):
        said = self.reports, self.warnings
        self.reports, self.warnings = [], []
        return said

    def pytest_runtest_logreport(self, report):
        self.reports.append(self.config.hook.pytest_report_to_serializable(config=self.config, report=report))

    def pytest_warning_recorded(self, warning_message, when, nodeid, location):
        w = warning_message  # of a class that the test made, perhaps
        said = str(w.message), w.category.__name__, w.filename, w.lineno
        self.warnings.append((said, dict(when=when, nodeid=nodeid, location=location)))
