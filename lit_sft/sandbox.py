"""Jinja from elsewhere, in a process of its own with little time and memory, which ends without harm to this one.

A template is code, and most of what it can ask for (a sum, a sort, a format, a comparison) runs in C, where nothing
can interrupt it but the end of its process. A line of JSON goes there, one comes back: some 40 µs a rendering.
"""

import atexit
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lit_sft.errors import InputError

TEMPLATE_SECONDS = 10.0
SLOW = 0.1  # seconds of a rendering; such ones have TEMPLATE_SECONDS together, as each of a thousand rows may be one
TEMPLATE_BYTES = 1 << 30
TOO_LARGE = "it takes more than 1 GB of memory"
LONGEST_ANSWER = 1 << 20, 16  # characters, and more for each byte that is asked with
# What templates write as today: the day that Llama 3's have where it is not known. With the real one, the same data
# would give other shards tomorrow, and a prompt would not be that of the training.
TODAY = datetime(2024, 7, 26)


def render_jinja(template: str, variables: dict[str, Any]) -> str:
    """The text of a template. InputError says why there is none: its own refusal, an error, a limit."""
    return _process.ask("text", template, variables)


def template_variables(template: str) -> set[str]:
    """The names that a template expects to be given. InputError: it is not Jinja."""
    return set(_process.ask("names", template, {}))


class _Process:
    """The process, started when it is first needed and again when it has died; one request at a time."""

    def __init__(self) -> None:
        self.lock, self.child, self.parent, self.template = threading.Lock(), None, 0, None
        self.over: dict[str, str] = {}  # templates that were over a limit once, which each row would be again
        atexit.register(self.end)

    def ask(self, what: str, template: str, variables: dict[str, Any]) -> Any:
        with self.lock:
            if template in self.over:
                raise InputError(self.over[template])
            try:
                if self.child is None or self.parent != os.getpid():  # a fork's own
                    self.start()
                known = template == self.template
                request = json.dumps([what, None if known else template, variables, TEMPLATE_SECONDS]) + "\n"
                self.child.stdin.write(request.encode())
                self.child.stdin.flush()
                self.template = template
                answer = self.child.stdout.readline()
            except BrokenPipeError:
                answer = b""
            except BaseException:  # a signal: the answer would be taken for that to the next request
                self.end()
                raise
            if not answer.endswith(b"\n"):
                code = self.end()
                late = code == -signal.SIGALRM
                self.over[template] = (
                    f"it takes more than {TEMPLATE_SECONDS:g} s" if late else f"it ends Python ({code})"
                )
                raise InputError(self.over[template])
        result, problem = json.loads(answer)
        if problem is not None:
            if problem == TOO_LARGE:
                self.over[template] = problem
            raise InputError(problem)
        return result

    def start(self) -> None:
        paths = list(map(os.path.abspath, sys.path))
        code = f"import sys; sys.path[:] = {paths!r}; from lit_sft.sandbox import serve; serve()"
        # in a session of its own the signals of a terminal or a scheduler do not reach it; it ends with its parent
        self.child = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.parent, self.template = os.getpid(), None

    def end(self) -> int | None:
        """End the process; gives its exit code if it has ended before."""
        child, self.child = self.child, None
        if child is None or self.parent != os.getpid():
            return None
        child.stdout.close()
        try:
            child.stdin.close()
            code = child.wait(0.5)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            child.kill()
            code = child.wait()
        return code


_process = _Process()

# --- what runs in the process ---


def serve() -> None:
    """Answer a line with a line until there are no more; the alarm's default is the end of the process."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    statm = Path("/proc/self/statm")
    if statm.exists():  # only Linux limits addresses
        most = int(statm.read_text().split()[0]) * resource.getpagesize() + TEMPLATE_BYTES
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    environment, source, compiled, left = _environment(), "", None, 0.0
    for line in sys.stdin.buffer:
        what, new, variables, seconds = json.loads(line)
        if new is not None:
            source, compiled, left = new, None, seconds
        result, problem, start = None, None, time.process_time()
        signal.setitimer(signal.ITIMER_REAL, max(left, 0.001))
        try:
            if what == "names":
                names = jinja2.meta.find_undeclared_variables(environment.parse(source))
                result = sorted(names - environment.globals.keys())
            else:
                compiled = compiled or environment.from_string(source)
                result = compiled.render(variables)
                if len(result) > LONGEST_ANSWER[0] + LONGEST_ANSWER[1] * len(line):
                    raise ValueError(f"it writes {len(result):,} characters")
            result = json.dumps(result)
        except MemoryError:
            result, problem = None, TOO_LARGE
        except Exception as error:  # whatever a text written elsewhere runs into
            said = " ".join(str(error)[:2000].split())[:500] or type(error).__name__
            where = f" (line {error.lineno})" if what == "names" and hasattr(error, "lineno") else ""
            result, problem = None, said + where
        signal.setitimer(signal.ITIMER_REAL, 0)
        if (took := time.process_time() - start) > SLOW:
            left -= took
        sys.stdout.write(f"[{result or 'null'}, {json.dumps(problem)}]\n")
        sys.stdout.flush()


class _Generation(jinja2.ext.Extension):
    """``{% generation %}``, by which transformers knows what the model says: the text in it is written as it is."""

    tags = {"generation"}  # noqa: RUF012 (jinja's own way)

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        """The statements up to ``{% endgeneration %}``."""
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _environment() -> ImmutableSandboxedEnvironment:
    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    del environment.globals["lipsum"]  # which is another text each time
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = TODAY.strftime
    return environment
