"""Small files from elsewhere, JSON and YAML among them, read whole and with distrust."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from lit_sft.errors import InputError

MOST_BYTES = 1 << 28
"""Of a file that is read whole; the largest there are, tokenizer.json of models, take a tenth of it."""
YAML_BYTES, YAML_DEPTH, NUMBER = 1 << 20, 50, re.compile(r"[-+\w.:]*\d[-+\w.:]*", re.ASCII)


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """A file as a whole; OSError: it cannot be read, InputError: it may never end, as a pipe or a device, or is large.

    To be called for each file from elsewhere that is not read in pieces.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is no regular file; put one in its place")
    if (size := path.stat().st_size) > most:
        raise InputError(f"{path} has {size:,} bytes, more than the {most:,} that such a file may have; look into it")
    return path.read_bytes()


def read_json(path: Path) -> dict:
    """A JSON object from a file; InputError names the file and what is wrong with it."""
    try:
        content = json.loads(read_bytes(path).decode())
    except FileNotFoundError:
        raise InputError(f"{path} is missing; download the checkpoint again with scripts/download.py") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not an object")
    return content


class NotYAML(ValueError):  # noqa: N818 (it is said of a text)
    """A text is no YAML, or is YAML that nobody means; the message, on one line, says why."""


def load_yaml(text: str, load: Callable[[str], Any] = yaml.safe_load) -> Any:
    """What a YAML text says, as ``load`` reads it; NotYAML: it cannot be read, or has aliases, or nests deeply.

    A few lines of aliases of aliases are lists of 10⁹ elements to whoever prints or compares them.
    """
    depth = 0
    try:
        for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            if isinstance(event, yaml.AliasEvent):
                raise NotYAML(f"it has the alias *{event.anchor:.40}; write out what it stands for")
            if isinstance(event, yaml.ScalarEvent) and len(event.value) > 1000 and NUMBER.fullmatch(event.value):
                raise NotYAML(f"it has a number of {len(event.value):,} characters")  # slow to read, if at all
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > YAML_DEPTH:
                raise NotYAML(f"it is nested deeper than {YAML_DEPTH} levels")
        return load(text)
    except NotYAML:
        raise
    except yaml.YAMLError as error:
        raise NotYAML(" ".join(str(error).split())) from None
    except (ValueError, LookupError, AttributeError, TypeError):  # how PyYAML ends on !!int "" and its like
        raise NotYAML("it holds a value that is none of its kind") from None  # and may be a secret


def read_yaml(path: Path) -> Any:
    """What a YAML file says; OSError: it cannot be read; NotYAML, InputError: as for ``load_yaml``, ``read_bytes``."""
    return load_yaml(read_bytes(path, YAML_BYTES).decode())
