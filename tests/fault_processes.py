"""A process that has imported everything heavy and forks others, which then start in no time.

Each line on standard input is an ``atlas`` command as JSON: arguments, environment, log file, and perhaps a
fault to be met. The answer is the process's id; when the command has ended, its exit code is in LOG.code.

Faults: ``hold`` stops in the named kind of step at its n-th report, touches ``reached-KIND`` in the home
folder and waits there until ``go`` appears; ``memory`` lets the first pass over the text of a kind of step
find too little memory; ``flaky`` breaks the first attempts at it as a connection does; ``disk`` bounds the
size of any file written.
"""

import json
import os
import resource
import signal
import socket
import sys
import time
import traceback
from pathlib import Path


class Held:
    """Progress that stops at its n-th report and waits there."""

    def __init__(self, progress, kind, at):
        self.progress, self.kind, self.left = progress, kind, at

    def update(self, done, total, message=""):
        self.progress.update(done, total, message)
        self.left -= 1
        home = Path(os.environ["ATLAS_HOME"])
        if self.left == 0:
            (home / f"reached-{self.kind}").touch()
        while self.left == 0 and not (home / "go").exists():
            time.sleep(0.02)


def install(fault):
    """Put a fault between the executors and the steps."""
    from atlas.pipeline import execute, local
    from atlas.pipeline.steps import STEPS

    kind, real = fault["kind"], execute.run_step

    def held(plan, name, settings, progress):
        mine = plan.step(name).kind == kind
        real(plan, name, settings, Held(progress, kind, fault["at"]) if mine else progress)

    def failing(context):
        count = Path(os.environ["ATLAS_HOME"], f"tried-{kind}")
        tried = count.read_text().split() if count.exists() else []
        count.write_text(" ".join([*tried, "x"]))
        if len(tried) < fault["times"]:
            raise MemoryError("injected") if fault["do"] == "memory" else ConnectionResetError("injected")
        step(context)

    if fault["do"] == "hold":
        execute.run_step = local.run_step = held
    elif fault["do"] == "disk":
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault["bytes"], fault["bytes"]))
    else:
        step, STEPS[kind] = STEPS[kind], failing


def run(request):
    """Be the command."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.update(request["env"])
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    import workers.tasks
    from atlas import cli
    from atlas.pipeline import retries

    retries.back_off = lambda attempt: 0.1 * 2**attempt  # the same, twenty times faster
    retries.WAIT_SECONDS = 1.0
    workers.tasks.HOUSEKEEPING_SECONDS = 3.0  # of 15
    if "ATLAS_TEST_HOST" in os.environ:
        socket.gethostname = lambda: os.environ["ATLAS_TEST_HOST"]
    if request["fault"]:
        install(request["fault"])
    sys.argv = ["atlas", *request["args"]]
    code = 1
    try:
        cli.main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:  # noqa: BLE001 (shown by the test)
        traceback.print_exc()
    finally:
        Path(request["log"] + ".code").write_text(str(code))
        sys.stdout.flush()
        os._exit(code)


def serve():
    """Fork a process for every line."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            run(json.loads(line))
        print(pid, flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import torch

    import atlas.cli.build
    import atlas.cli.gc
    import atlas.cli.worker
    import atlas.pipeline.garbage
    import atlas.pipeline.local
    import atlas.pipeline.steps  # noqa: F401
    import workers.tasks  # noqa: F401
    from atlas.configs import ModelConfig
    from atlas.lm.load import load_model

    load_model(ModelConfig("docs-2l"), torch.device("cpu"))  # kept, and so shared by all children
    print("ready", flush=True)
    serve()
    os._exit(0)  # nothing to tidy up, which takes long with all that was imported
