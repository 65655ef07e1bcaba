"""Grade submitted notebooks with the book's checks.

    python tools/grade.py FOLDER [--to grades.csv] [--cell 60] [--notebook 600] [--memory 2] [--rounds 3]

FOLDER holds a folder for each student, with notebooks that have the names of their chapters: `ada/03_rounding.ipynb`,
or `ada/session2/03_rounding.ipynb` as nbgrader collects them. (A notebook that lies in FOLDER itself is a student's,
too.) The table has a row for each exercise of each notebook: student, chapter, check, passed (1 or 0), why not,
seconds.

A notebook runs in a process of its own behind a fence (tools/fence.py), with a time for each cell, for each check and
for the whole. Its cells that are the book's own need not run again: the names that they define are there. Where an
answer needs more of them (a trained model), the notebook runs whole. A cell that ends the process, or does not end, is
left out, and the notebook is run again without it.

The checks come from the book, and run in a namespace that the notebook does not share. What they stand on (functions
and methods of PyTorch, NumPy, Python and modelzip) is put back before each of them if the notebook has replaced it. A
check runs several times, with new numbers by chance each time; with each submission it must also accept the book's
solution and refuse the stub, else nobody passes it.
"""

import argparse, ast, contextlib, csv, functools, json, os, re, secrets, select, shutil, signal, sys, tempfile, time
import types
from pathlib import Path

import answers, fence

ROOT = Path(__file__).resolve().parent.parent
FIELDS = ["student", "chapter", "check", "passed", "why", "seconds"]
LARGEST = 50 << 20  # bytes of a notebook
STANDS_ON = """builtins math random itertools collections fractions json zipfile numpy numpy.random numpy.linalg
torch torch.nn torch.nn.functional torch.linalg torch.testing fastcore.test""".split()
CLAIMS = set(
    "__eq__ __ne__ __lt__ __le__ __gt__ __ge__ __sub__ __rsub__ __abs__ __torch_function__ __array_ufunc__".split()
)


# ---------------------------------------------------------------------------------- what was handed in


def exercises_of(chapter):
    return [e for e, (c, _) in answers.EXERCISES.items() if c == chapter]


CHAPTERS = {c for c, _ in answers.EXERCISES.values()}


def chapter_of(path, book):
    "Which chapter a notebook is: by its name, else by what the handout has written into it."
    names = {c.split("/")[-1]: c for c in CHAPTERS}
    told = book.get("metadata", {}).get("modelzip", {}) if isinstance(book.get("metadata"), dict) else {}
    within = [c for n, c in names.items() if n in path.stem]
    return (
        names.get(path.stem)
        or names.get(str(told.get("chapter", "") if isinstance(told, dict) else "").split("/")[-1])
        or (max(within, key=len) if within else None)
    )


def read(path):
    "A notebook and its code cells; ValueError: why it is none."
    if path.is_symlink() or not path.is_file() or path.stat().st_size > LARGEST:
        raise ValueError("it is no file of a notebook's size")
    try:
        book = json.loads(path.read_bytes())
        code = [c for c in book["cells"] if c["cell_type"] == "code"]
        return book, ["".join(c["source"]) for c in code]
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise ValueError(f"it is no notebook: {type(e).__name__} {e}") from None


def submissions(folder):
    "(student, path or None) of all that lies in a folder."
    for place in sorted(p for p in folder.iterdir() if not p.name.startswith(".")):
        if place.is_dir():
            found = sorted(p for p in place.rglob("*.ipynb") if not any(s.startswith(".") for s in p.parts))
            yield from ((place.name, p) for p in found or [None])
        elif place.suffix == ".ipynb":
            yield place.stem, place


def squeezed(source):
    return re.sub(r"\s+", "", source)


@functools.cache
def of_the_book(chapter):
    return {squeezed(c.text) for c in answers.cells(chapter)} - {
        squeezed(answers.solution(e).text) for e in exercises_of(chapter)
    }


@functools.cache
def made_by_the_book(chapter):
    "Names that a chapter's cells assign: an answer that asks for one of them needs the whole notebook."
    trees = [ast.walk(c.tree) for c in answers.cells(chapter)]
    return {n.id for tree in trees for n in tree if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


# ---------------------------------------------------------------------------------- what checks stand on


def foundations():
    "Owner, name and value of all functions and classes that a check may call; of Python functions the code, too."
    modules = [m for n, m in list(sys.modules.items()) if n in STANDS_ON or n.split(".")[0] == "modelzip"] + [answers]
    classes = {c for m in modules for c in vars(m).values() if isinstance(c, type)}
    ours = [c for c in classes if c.__module__.startswith(("modelzip", "torch"))]
    held = [(o, n, v) for o in [*modules, *ours] for n, v in list(vars(o).items()) if solid(n, v)]
    functions = {v for _, _, v in held if isinstance(v, types.FunctionType)}
    return held, [(f, a, getattr(f, a)) for f in functions for a in ("__code__", "__defaults__", "__kwdefaults__")]


def solid(name, value):
    kinds = types.FunctionType, types.BuiltinFunctionType, type, classmethod, staticmethod, property
    return isinstance(value, kinds) or type(value).__name__ in (
        "method_descriptor",
        "wrapper_descriptor",
        "getset_descriptor",
    )


def put_back(held):
    "Undo what was replaced: the names of it."
    found = []
    for owner, name, value in [*held[0], *held[1]]:
        now = getattr(owner, name, None) if isinstance(owner, types.FunctionType) else vars(owner).get(name)
        if now is not value:
            setattr(owner, name, value)
            found.append(f"{owner.__name__}.{name}")
    return found


# ---------------------------------------------------------------------------------- behind the fence


def honest(attempt):
    "An answer whose results are no objects that claim to be equal to everything."
    if isinstance(attempt, type) or not callable(attempt):
        return attempt

    @functools.wraps(attempt)
    def answer(*args, **named):
        found = attempt(*args, **named)
        for c in type(found).__mro__:
            if c.__module__ == "__main__" and CLAIMS & vars(c).keys() and not hasattr(c, "__dataclass_fields__"):
                raise AssertionError(f"what comes back is a {c.__name__}, which says itself what it is equal to")
        return found

    return answer


def judge(exercise, base, mine, failed, held, rounds):
    "State and message of one exercise, in words for the table."
    tampered = put_back(held)
    _, name = answers.stub(exercise)
    if name not in mine:
        return "not yet", "; ".join([f"{name} is as it was handed out, or not there", *failed[-1:]])
    space, check = answers.with_check(exercise, base)
    for n in rounds:
        verdict = check(honest(mine[name]), seed=n)
        if late := put_back(held):
            return "wrong", f"it replaced {', '.join(late[:3])} while it was checked"
        if verdict.state != "done":
            break
    else:
        right, stub = answers.solution(exercise), answers.stub(exercise)[0]
        if (
            not check(answers.answer_of(right, space, name))
            or check(answers.answer_of(stub, space, name)).state != "not yet"
        ):
            return "wrong", "with this notebook the check no longer tells right from wrong"
    said = f" ({', '.join(tampered[:3])} had been replaced, and was put back)" if tampered else ""
    return verdict.state, "; ".join([verdict.message + said, *failed[-1:] * (verdict.state != "done")])


def work(chapter, cells, whole, left_out, judged, tell, options, scratch):
    "Run a notebook's cells, then the checks; each step is told before it begins."
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    base = answers.namespace(chapter, scratch)
    held = foundations()
    mine = base | {"__name__": "__main__"}
    new = [i for i, c in enumerate(cells) if i not in left_out and (whole or squeezed(c) not in of_the_book(chapter))]
    if not whole:
        mentioned = set().union(*(answers.names(answers.Cell(cells[i]).tree) for i in new))
        answers.define(mentioned, mine, chapter, None)
    config = Config()
    config.HistoryManager.enabled = False
    shell = InteractiveShell.instance(user_ns=mine, config=config)
    shell.ask_exit = sys.exit
    failed = []
    for i in new:
        tell("cell", i)
        result = shell.run_cell(cells[i], store_history=False, silent=True)
        if error := result.error_before_exec or result.error_in_exec:
            failed.append(f"code cell {i + 1} raised {type(error).__name__}: {error}")
    sys.settrace(None), sys.setprofile(None)
    for exercise in exercises_of(chapter):
        if exercise in judged:
            continue
        tell("check", exercise)
        began = time.perf_counter()
        try:
            state, why = judge(exercise, base, mine, failed, held, options.seeds)
        except BaseException as e:  # SystemExit, too
            state, why = "wrong", f"it ended with {type(e).__name__}: {e}"
        tell("verdict", exercise, state, str(why), time.perf_counter() - began)
    tell("end")


def behind_the_fence(chapter, cells, whole, left_out, judged, pipe, token, options, scratch):
    "What the forked process does: never returns."
    os.setsid()
    os.closerange(3, pipe), os.closerange(pipe + 1, 1 << 16)  # what the grader has open, its table above all
    nothing = os.open(os.devnull, os.O_RDWR)
    for n in 0, 1, 2:
        os.dup2(nothing, n)
    here = {*map(os.path.realpath, filter(None, sys.path)), sys.prefix, sys.base_prefix}
    readable = [*(p for p in here if not ROOT.is_relative_to(p)), ROOT / "modelzip", ROOT / "bench"]
    readable += ["/usr", "/lib", "/lib64", "/etc", "/opt", "/proc", "/sys", "/dev"]

    def tell(*what):
        os.write(pipe, (token + json.dumps(what) + "\n").encode())

    born = lambda worker: tell("worker", worker)
    said = fence.raise_fence(scratch, readable, options.memory, options.notebook, born)
    os.environ |= {"HOME": str(scratch), "TMPDIR": str(scratch), "IPYTHONDIR": str(scratch / "ipython")}
    tempfile.tempdir = None
    (scratch / "nbs").mkdir(exist_ok=True)
    (scratch / "bench").symlink_to(ROOT / "bench")
    os.chdir(scratch / "nbs")

    tell("fence", said)
    try:
        work(chapter, cells, whole, left_out, judged, tell, options, scratch)
    except BaseException as e:
        tell("trouble", f"{type(e).__name__}: {e}")


# ---------------------------------------------------------------------------------- outside


def messages(pipe, token, limit, until):
    "What is told from behind the fence, and at the end why it is silent: 'ended', 'step', 'whole'."
    held, deadline = b"", until
    while True:
        left = min(deadline, until) - time.monotonic()
        if left <= 0 or not select.select([pipe], [], [], left)[0]:
            yield ["silent", "whole" if until <= deadline else "step"]
            return
        if not (more := os.read(pipe, 1 << 16)):
            yield ["silent", "ended"]
            return
        *lines, held = (held + more).split(b"\n")
        held = held[-(1 << 20) :]
        for line in lines:
            if line.startswith(token.encode()):
                with contextlib.suppress(ValueError):
                    yield (told := json.loads(line[len(token) :]))
                    deadline = time.monotonic() + limit if told[0] in ("cell", "check") else until


def one_run(chapter, cells, whole, left_out, judged, options, until):
    "Verdicts of one process, the step at which it ended or was ended (None: it came to the end), why, the fence."
    scratch, token = Path(tempfile.mkdtemp(prefix="grade-")), secrets.token_hex(16)
    read_end, write_end = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(read_end)
            behind_the_fence(chapter, cells, whole, left_out, judged, write_end, token, options, scratch)
        finally:
            os._exit(1)
    os.close(write_end)
    verdicts, step, fences, worker = {}, ("cell", None), [], None
    try:
        for kind, *what in messages(read_end, token, options.cell, until):
            if kind == "fence":
                fences = what[0]
            elif kind == "trouble" and step[1] is None or what == ["ended"] and not fences:
                raise RuntimeError(f"{chapter} cannot be graded, whatever the notebook: {what[0]}")
            elif kind == "worker":
                worker = worker or what[0]
            elif kind == "verdict":
                verdicts[what[0]] = what[1:]
            elif kind == "end":
                step = None
            elif kind == "silent":
                if worker and what[0] != "ended":  # it is still there, whatever it has done not to die with its parent
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(worker, signal.SIGKILL)
                return verdicts, step, what[0], fences
            else:
                step = kind, what[0]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read_end)
        shutil.rmtree(scratch, ignore_errors=True)


WHY = {
    "ended": "ended the process",
    "step": "did not end within {0.cell:g} s",
    "whole": "the notebook took longer than {0.notebook:g} s",
}


def grade(chapter, cells, options):
    "Check → (state, why, seconds) for one notebook; and what fenced it in."
    until, whole = time.monotonic() + options.notebook, False
    left_out, judged, notes, fences = set(), {}, [], []
    while True:
        verdicts, step, silent, found = one_run(chapter, cells, whole, left_out, judged, options, until)
        judged, fences = judged | verdicts, found or fences
        asked = [re.search(r"NameError: name '(\w+)'", why) for _, why, _ in judged.values()]
        if not whole and any(m and m[1] in made_by_the_book(chapter) for m in asked):
            whole, left_out, judged = True, set(), {e: v for e, v in judged.items() if v[0] == "done"}
            continue
        if step is None:
            break
        said = WHY[silent].format(options)
        if silent == "whole" or step[1] is None:
            notes.append(said)
            break
        if step[0] == "cell":
            left_out.add(step[1])
            notes.append(f"code cell {step[1] + 1} {said}")
        else:
            judged[step[1]] = "wrong", f"it {said}", 0.0
    for exercise in exercises_of(chapter):
        judged.setdefault(exercise, ("wrong", "not reached", 0.0))
    with_notes = lambda state, why: why if state == "done" else "; ".join([why, *notes])
    return {e: (state, with_notes(state, why), s) for e, (state, why, s) in judged.items()}, fences


def plain(text):
    "A cell of a table: one line, not long, and no formula for a spreadsheet."
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())[:400]
    return f"'{line}" if line[:1] in ("=", "+", "-", "@") else line


def rows(folder, options):
    "The table, and what fenced the notebooks in."
    for student, path in submissions(folder):
        empty = {"student": plain(student), "chapter": "", "check": "", "passed": 0, "seconds": 0.0}
        if path is None:
            yield empty | {"why": "no notebook"}, []
            continue
        try:
            book, cells = read(path)
            chapter = chapter_of(path, book)
            if chapter is None:
                raise ValueError("which chapter is it? Its name is that of none")
        except ValueError as e:
            yield empty | {"chapter": plain(path.stem), "why": plain(e)}, []
            continue
        found, fences = grade(chapter, cells, options)
        for exercise in exercises_of(chapter):
            state, why, seconds = found[exercise]
            yield (
                empty
                | {
                    "chapter": chapter,
                    "check": exercise.split(":")[1],
                    "passed": int(state == "done"),
                    "why": "" if state == "done" else plain(why),
                    "seconds": round(seconds, 2),
                },
                fences,
            )


def ready(folder):
    "Import once, in the process that all others are copies of, what the chapters import that were handed in."
    import torch
    import torch._dynamo  # it replaces `torch.manual_seed`, else when the first gradient asks for it
    from IPython.core import interactiveshell

    torch.set_num_threads(1)
    for _, path in submissions(folder):
        with contextlib.suppress(ValueError):
            if path and (chapter := chapter_of(path, read(path)[0])):
                answers.imported(chapter)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--to", type=Path, help="the table; grades.csv in the folder when left out")
    parser.add_argument("--cell", type=float, default=60, help="seconds for a cell, and for a check")
    parser.add_argument("--notebook", type=float, default=600, help="seconds for a notebook")
    parser.add_argument("--memory", type=float, default=2, help="GiB beyond what the book's modules take")
    parser.add_argument("--rounds", type=int, default=3, help="how often a check runs, each time with other numbers")
    options = parser.parse_args()
    if not options.folder.is_dir():
        parser.error(f"{options.folder} is no folder")
    if not hasattr(os, "fork"):
        parser.error("this system cannot fork a process; Linux and macOS can")
    options.memory = int(options.memory * 2**30)
    options.seeds = [secrets.randbelow(2**31) for _ in range(options.rounds)]
    ready(options.folder)
    to = options.to or options.folder / "grades.csv"
    part, marks, fences = (
        to.with_name(f"{to.name}.part"),
        [],
        [],
    )  # the table that was there stays until this one is whole
    with open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        for row, said in rows(options.folder, options):
            writer.writerow(row)
            file.flush()
            marks.append(row["passed"])
            fences = said or fences
            mark = "✓" if row["passed"] else "✗"
            print(f"{row['student']:<20} {row['chapter']:<22} {row['check']:<24} {mark} {row['why'][:80]}", flush=True)
    os.replace(part, to)
    print(f"{sum(marks)} of {len(marks)} passed; fenced by: {', '.join(fences) or 'nothing'}; {to}")


if __name__ == "__main__":
    main()
