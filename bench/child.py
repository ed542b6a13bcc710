"""A forked copy of this process: a real process without the seconds that importing torch takes.

For the tests, and for bench/faults.py.
"""

import os
import signal
import sys
import time
import traceback

from runtime.process import launch


class Child:
    """A forked copy of this process that calls a function; what it prints goes to a file."""

    def __init__(self, path, call, *args, **environment):
        self.path, self.status = path, None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                redirect_output(path)
                os.environ.update(environment)
                call(*args)
                code = 0
            except SystemExit as e:
                if isinstance(e.code, str):
                    print(e.code, file=sys.stderr)
                code = 1 if isinstance(e.code, str) else e.code or 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

    def output(self):
        return self.path.read_text(errors="replace") if self.path.exists() else ""

    def ended(self):
        """Whether the child has ended; asking once a millisecond costs nothing."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status is not None

    def wait(self, seconds=600):
        """(exit status, negative for a signal; everything it printed).

        A child that has not ended after so many seconds is killed.
        """
        deadline = time.monotonic() + seconds
        while not self.ended():
            if time.monotonic() > deadline:
                self.send(signal.SIGKILL)
            time.sleep(0.002)
        return self.status, self.output()

    def send(self, *numbers):
        """Send signals, one after another, to a child that has not ended."""
        for number in numbers:
            if self.status is None:
                os.kill(self.pid, number)


def redirect_output(path):
    """Have stdout and stderr of this process go to the file `path`."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", closefd=False)


def run_script(script, argv):
    """Do what `python SCRIPT.py ARGV` does."""
    sys.argv = [script.__file__, *argv]
    launch(script.main, script.Config)
