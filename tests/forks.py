"""Programs that each get a process of their own, without each importing PyTorch, which takes longer than most of them
run: the process is a fork of one that has imported PyTorch, and nothing else. It finds the packages of a folder that
may be another than its parent's."""

import subprocess
from contextlib import contextmanager

# Per call: where its packages are, the shell's number, the folder and the arguments come through one named pipe, the
# exit status goes back through another. What is read, written and set is the shell's. (Optimizers load torch._dynamo.)
PARENT = """
import gc, os, runpy, sys, sysconfig, torch._dynamo
gc.freeze()  # what is there is looked through by no child
while True:
    with open("asks") as asks: ask = asks.read().split("\\0")[:-1]
    pid = os.fork()
    if not pid: break
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with open("answers", "w") as answers: print(status % 256, file=answers)
packages, shell, folder, *sys.argv = ask
sys.path[sys.path.index(sysconfig.get_path("purelib"))] = packages
os.chdir(folder)
for i in 1, 2: os.dup2(os.open(f"/proc/{shell}/fd/{i}", os.O_WRONLY), i)
with open(f"/proc/{shell}/environ") as file: variables = file.read().split("\\0")[:-1]
os.environ.clear()
os.environ.update(v.split("=", 1) for v in variables)
if sys.argv[0] == "-c": exec(compile(sys.argv.pop(1), "<string>", "exec"), vars(sys.modules["__main__"]))
else: runpy.run_path(sys.argv[0], run_name="__main__")
"""

SHELL = """
forked() {{
  printf '%s\\0' '{packages}' $$ "$PWD" "$@" > '{place}/asks'
  read -r status < '{place}/answers'
  return "$status"
}}
python() {{ forked "$@"; }}
modelzip() {{ forked '{bin}/modelzip' "$@"; }}
"""


@contextmanager
def forking(python, place):
    """A function that runs a text as `sh` does in a folder where the commands `python` and `modelzip` are those of an
    environment, in forks, with the packages of a folder."""
    place.mkdir()
    subprocess.run(["mkfifo", "asks", "answers"], cwd=place, check=True)
    parent = subprocess.Popen([str(python), "-I", "-c", PARENT], cwd=place)

    def shell(text, packages, cwd, env):
        text = SHELL.format(place=place, packages=packages, bin=python.parent) + text
        done = subprocess.run(["sh", "-eu", "-c", text], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
        assert parent.poll() is None
        return done

    try:
        yield shell
    finally:
        parent.kill()
        parent.wait()
