"""Both doors of every command: ``python scripts/NAME.py`` and ``lit-sft NAME``. The only user of jsonargparse."""

import sys
import traceback
from collections.abc import Callable
from dataclasses import MISSING, fields
from importlib import import_module
from inspect import cleandoc
from pathlib import Path
from typing import get_type_hints

import jsonargparse

from lit_sft import __version__
from lit_sft.errors import InputError, Interrupted, RunFailed


class Parser(jsonargparse.ArgumentParser):
    """A parser whose complaint is one line."""

    def error(self, message: str, ex: Exception | None = None) -> None:
        """Raise InputError with the complaint folded onto one line."""
        raise InputError(f"{' '.join(message.split())}; {self.prog} --help lists the flags")


def make_parser(main: Callable, prog: str) -> Parser:
    """The parser of the dataclass that ``main`` takes: a flat flag per field, its metadata as help and aliases."""
    arguments = next(iter(get_type_hints(main).values()))
    description = cleandoc(sys.modules[main.__module__].__doc__ or "")
    parser = Parser(prog=prog, description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file of any of these flags; flags given beside it win")
    types = get_type_hints(arguments)
    for f in fields(arguments):
        default = f.default_factory() if f.default is MISSING else f.default
        names = [f"--{name}" for name in (f.name, *f.metadata["aliases"])]
        parser.add_argument(*names, type=types[f.name], default=default, help=f.metadata["help"])
    return parser


def run(main: Callable, argv: list[str] | None = None, prog: str | None = None) -> None:
    """Parse ``argv``, call ``main`` with its dataclass, and turn how it ends into the exit code of the contract."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if sys.stdout and hasattr(sys.stdout, "reconfigure"):  # a text in any script prints in any locale
            sys.stdout.reconfigure(errors="replace")
        parser = make_parser(main, prog or Path(sys.argv[0]).name)
        namespace = parser.parse_args(argv)
        namespace.pop("config")
        code = main(next(iter(get_type_hints(main).values()))(**namespace.as_dict())) or 0
        sys.stdout.flush()
    except (InputError, OSError, jsonargparse.ArgumentError) as error:
        code = 141 if isinstance(error, BrokenPipeError) else _complain(error, argv, 2)
    except KeyboardInterrupt as error:
        code = _complain(error, argv, 130, "interrupted; nothing was written under its final name")
    except Interrupted as end:
        print(end, file=sys.stderr)
        code = end.exit_code
    except RunFailed as error:
        code = _complain(error, argv, 1)
    except Exception as error:
        code = _complain(error, argv, 1, f"unexpected {type(error).__name__}: {error}; --debug true shows where")
    sys.exit(code)


def _complain(error: BaseException, argv: list[str], code: int, message: str | None = None) -> int:
    if any(flag == "--debug=true" or argv[i : i + 2] == ["--debug", "true"] for i, flag in enumerate(argv)):
        traceback.print_exception(error)
    print("error: " + " ".join((message or str(error)).split()), file=sys.stderr)
    return code


def commands() -> dict[str, str]:
    """Every command's name and module, read from the two folders that hold them."""
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
        print(f"lit_sft {__version__}")
    elif name in (known := commands()):
        run(import_module(known[name]).main, sys.argv[2:], prog=f"lit-sft {name}")
    else:
        print(
            "usage: lit-sft COMMAND [FLAGS]\n\ncommands: "
            + ", ".join(known)
            + "\nlit-sft COMMAND --help lists its flags"
        )
        if name not in ("__help", "_h", "help"):
            print(f"error: unknown command {sys.argv[1]!r}; the commands are listed above", file=sys.stderr)
            sys.exit(2)


if __name__ == "__main__":
    main()
