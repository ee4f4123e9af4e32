"""Both doors of every command: ``python scripts/NAME.py`` and ``lit-sft NAME``. The only user of jsonargparse."""

import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import MISSING, fields
from importlib import import_module
from inspect import cleandoc
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import jsonargparse

import lit_sft
from lit_sft.args import LIMITS
from lit_sft.documents import YAML_BYTES, NotYAML, load_yaml, read_bytes
from lit_sft.errors import EXIT_CODES, InputError, Interrupted, RunFailed, stops, words
from lit_sft.output import outliving
from lit_sft.redact import remember_arguments, shortened, without_secrets

SIGNALS = EXIT_CODES.keys() - {signal.SIGINT}  # of which Python makes a KeyboardInterrupt by itself
UNFINISHED = "nothing is left half written"
OTHERS_WORDS = 0.5  # what the first of them gives the others to say why they fail too, before it ends them
OTHERS_SECONDS = 4.0  # a process that failed waits as long for the first of them, whose exit code is the command's


class Parser(jsonargparse.ArgumentParser):
    """A parser whose complaint is one line."""

    def error(self, message: str, ex: Exception | None = None) -> None:
        """Raise InputError with the complaint folded onto one line, in the user's words rather than Python's."""
        text = " ".join(message.split())
        if "unrecognized arguments:" in text:
            text = _unrecognized(text)
        text = re.sub(r"Does not .* Subtypes: \[(.+?), <class 'None.* value:", r"Expected a \1. Got value:", text)
        text = re.sub(r": Expected a (.+?)\. Got value:", r": expected \1, got", text)
        text = re.sub(r"<class '(\w+)'>|typing\.(Literal)", r"\1\2", re.sub(r'Parser key "(\w+)"', r"--\1", text))
        text = re.sub(r"(--access_token: .*?, got ).*", r"\1something else", text)  # never its value
        text = re.sub(r"(the tag '|Unexpected config: ).*?('|$)", r"\1…\2", text)  # which may be one
        if "expected one argument" in text:
            text += " (one that begins with a dash is written --FLAG=VALUE)"
        raise InputError(f"{text}; {self.prog} --help lists the flags")

    def dump(self, *args: Any, **kwargs: Any) -> str:
        """The text of --print_config: a token is not for files, so it is left out."""
        return re.sub(r"(?m)^(access_token:).*(\n .*)*", r"\1 null", super().dump(*args, **kwargs))


def _unrecognized(message: str) -> str:
    """What the parser did not know, by the names of flags alone: any value may be a token under a misspelt name."""
    words = re.findall(r" (--?[a-z][\w-]*)", message.partition("unrecognized arguments:")[2], re.IGNORECASE)
    names = [re.sub(r"(?i)(token)\w{2,}", r"\1…", name) for name in words]  # the = may have been forgotten
    return f"unrecognized arguments: {' '.join(names) or 'a word that no flag takes'}"


_yaml_value = jsonargparse.get_loader("yaml")


def _load(text: str) -> Any:
    """What a flag's text or a config file says, as jsonargparse reads YAML; NotYAML as for ``load_yaml``."""
    return load_yaml(text, _yaml_value)


jsonargparse.set_loader("yaml", _load, (NotYAML,))


class ConfigFile(jsonargparse.ActionConfigFile):
    """--config: its file is looked at before jsonargparse reads it, which expects one that is in order."""

    def __call__(self, parser: Parser, cfg: Any, values: str, option_string: str | None = None) -> None:
        """As the parser calls it; InputError: the file cannot be read, or is no YAML."""
        if (path := Path(values)).exists():
            try:
                content = _load(read_bytes(path, YAML_BYTES).decode())
            except ValueError as error:
                parser.error(f"--config {values}: {error}")
            if isinstance(content, dict) and (odd := [key for key in content if str(key).startswith("__")]):
                parser.error(f"--config {values}: {odd[0]!r:.80} is not accepted")  # jsonargparse's own
        super().__call__(parser, cfg, values, option_string)


def _arguments(main: Callable) -> Any:
    return next(iter(get_type_hints(main).values()))


def make_parser(main: Callable, prog: str) -> Parser:
    """The parser of the dataclass that ``main`` takes: a flat flag per field, its metadata as help and aliases."""
    arguments = _arguments(main)
    description = cleandoc(sys.modules[main.__module__].__doc__ or "")
    parser = Parser(prog=prog, description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action=ConfigFile, help="YAML file of these flags; flags given beside it win")
    types = get_type_hints(arguments)
    for f in fields(arguments):
        default = f.default_factory() if f.default is MISSING else f.default
        names = [f"--{name}" for name in (f.name, *f.metadata["aliases"])]
        # optional text is plain text to the parser, which otherwise reads "~" and "# x" as YAML's null; a file's null
        # reaches any flag and is judged by Args
        kind = str if types[f.name] == str | None else types[f.name]
        parser.add_argument(*names, type=kind, default=default, help=f.metadata["help"])
    return parser


def run(main: Callable, argv: list[str] | None = None, prog: str | None = None) -> None:
    """Parse ``argv``, call ``main`` with its dataclass, and turn how it ends into the exit code of the contract."""
    argv = sys.argv[1:] if argv is None else argv
    remember_arguments(argv)
    _forget_rank(main)
    try:
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                signal.signal(number, _stop)  # an exception, so that what is half written is cleaned up
        for name in ("stdout", "stderr"):  # closed before Python began
            if getattr(sys, name) is None:
                setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 (for as long as the process lives)
        if hasattr(sys.stdout, "reconfigure"):  # a text in any script prints in any locale
            sys.stdout.reconfigure(errors="replace")
        if argv and argv[0][:1] not in ("-", "") and "path" in get_type_hints(_arguments(main)):
            argv = ["--path", *argv]  # the one thing that a command looks at needs no name
        parser = make_parser(main, prog or Path(sys.argv[0]).name)
        namespace = parser.parse_args(_joined(main, _config_first(_named(main, argv))))
        from_file = namespace.pop("config") is not None
        values = namespace.as_dict()
        code = main(_arguments(main)(**(values | _limits_given_up(values, argv) if from_file else values))) or 0
        sys.stdout.flush()
    except (InputError, OSError, jsonargparse.ArgumentError) as error:
        code = 141 if isinstance(error, BrokenPipeError) else _complain(error, argv, 2)
    except KeyboardInterrupt as error:
        code = _complain(error, argv, 130, f"interrupted; {UNFINISHED}")
    except Interrupted as end:
        with outliving(sys.stderr):
            print(end, file=sys.stderr, flush=True)
        code = end.exit_code
    except RunFailed as error:
        code = _complain(error, argv, 1)
    except Exception as error:
        code = _complain(error, argv, 1, f"unexpected {type(error).__name__}: {error}; --debug true shows where")
    _leave(code)


def _config_first(argv: list[str]) -> list[str]:
    """The arguments with --config in front, as the parser lets the later one win: flags win wherever they stand."""
    first, rest, words = [], [], iter(argv)
    for word in words:
        if word == "--config":
            first += [word, *[value for value in [next(words, None)] if value is not None]]
        elif word.startswith("--config="):
            first.append(word)
        else:
            rest.append(word)
    return [*first, *rest]


def _limits_given_up(values: dict[str, Any], argv: list[str]) -> dict[str, None]:
    """The limits of a config file that one on the command line replaces, which otherwise might have no effect."""
    flags = {word.partition("=")[0] for word in argv}
    typed = [name for name in LIMITS if f"--{name}" in flags and values.get(name) is not None]
    return {name: None for name in LIMITS if typed and name in values and name not in typed}


def _leave(code: int) -> NoReturn:
    """End with this exit code: by SystemExit, but at once where this is one process of several.

    Gloo's threads live on until then, and one that wants to free a tensor just when the interpreter is taken down
    aborts the process, whatever its exit code was to be.
    """
    distributed = sys.modules.get("torch.distributed")
    if not (distributed and distributed.is_available() and distributed.is_initialized()):
        sys.exit(code)
    for number in EXIT_CODES:
        signal.signal(number, signal.SIG_DFL)
    with suppress(OSError, ValueError):  # nobody reads them any more
        sys.stdout.flush()
        sys.stderr.flush()
    first = os.getppid()  # it started the others, and is killed by Fabric five seconds after one of them failed
    limit = time.monotonic() + OTHERS_SECONDS
    while code and os.environ.get("LOCAL_RANK", "0") != "0" and os.getppid() == first and time.monotonic() < limit:
        time.sleep(0.02)
    runtime = sys.modules.get("lit_sft.runtime")
    if code and runtime and runtime.started:
        time.sleep(OTHERS_WORDS)
        for process in runtime.started:  # one may hang, and would for ever
            process.kill()
    os._exit(code)


def _named(main: Callable, argv: list[str]) -> list[str]:
    """The arguments with the name of the flag that may lack it: ``doctor DIR`` is ``doctor --checkpoint_dir=DIR``."""
    bare = [f.name for f in fields(next(iter(get_type_hints(main).values()))) if f.metadata.get("bare")]
    return [f"--{bare[0]}={argv[0]}", *argv[1:]] if bare and argv and not argv[0].startswith("-") else argv


def _joined(main: Callable, argv: list[str]) -> list[str]:
    """The arguments with flags that may be repeated once each: ``--x a --x b`` is ``--x=a,b``."""
    for flag in (f"--{f.name}" for f in fields(_arguments(main)) if f.metadata.get("several")):
        rest, values, words = [], [], iter(argv)
        for word in words:
            name, equals, value = word.partition("=")
            if name != flag:
                rest.append(word)
            else:
                values.append(value if equals else next(words, None))
        if len(values) > 1 and None not in values:
            argv = [*rest, f"{flag}={','.join(values)}"]
    return argv


def _forget_rank(main: Callable) -> None:
    """Drop a LOCAL_RANK that some other program left in the environment: it would silence this command's error."""
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        return
    started = "WORLD_SIZE" in os.environ and any(f.name == "devices" for f in fields(_arguments(main)))
    if not (started and os.environ.get("LOCAL_RANK", "").isdecimal()):
        os.environ.pop("LOCAL_RANK", None)


def _stop(number: int, _: object) -> None:
    stops.append(EXIT_CODES[number])
    raise Interrupted(f"error: stopped by {signal.Signals(number).name}; {UNFINISHED}", stops[-1])


def _complain(error: BaseException, argv: list[str], code: int, message: str | None = None) -> int:
    with outliving(sys.stderr):
        if re.search(r"--debug[= ](true|yes)\b", " ".join(argv), re.IGNORECASE):
            print(without_secrets("".join(traceback.format_exception(error))), file=sys.stderr, end="")
        if code != 2 or os.environ.get("LOCAL_RANK", "0") == "0":  # of several processes that see the same, one says it
            for line in (*getattr(error, "details", ()), f"error: {message or words(error)}"):
                print(shortened(without_secrets(" ".join(line.split()))), file=sys.stderr, flush=True)
    return code


def commands() -> dict[str, str]:
    """Every command's name and module, read from the two folders that hold them."""
    home = Path(lit_sft.__file__).parent
    if not (home / "scripts").is_dir() and str(home.parent) not in lit_sft.__path__:
        lit_sft.__path__.append(str(home.parent))  # a checkout: there they lie beside the package
    found = {}
    for package in ("finetune", "scripts"):
        for folder in import_module(f"lit_sft.{package}").__path__:
            names = sorted(path.stem for path in Path(folder).glob("[a-z]*.py"))
            found |= {name: f"lit_sft.{package}.{name}" for name in names}
    return found


def main() -> None:
    """``lit-sft NAME …``: the installed door to every command."""
    name = sys.argv[1].replace("-", "_") if len(sys.argv) > 1 else "__help"
    if name == "__version":
        print(f"lit_sft {lit_sft.__version__}")
    elif name in (known := commands()):
        run(import_module(known[name]).main, sys.argv[2:], prog=f"lit-sft {name}")
    else:
        print(
            "usage: lit-sft COMMAND [FLAGS]\n\ncommands: "
            + ", ".join(known)
            + "\nlit-sft COMMAND --help lists its flags"
        )
        if name not in ("__help", "_h", "help"):
            said = repr(without_secrets(sys.argv[1]).partition("=")[0])
            print(shortened(f"error: unknown command {said}; they are listed above"), file=sys.stderr)
            sys.exit(2)


if __name__ == "__main__":
    main()
