"""One file over HTTP: continued where it broke off, no longer than it may be; the client's warnings are not shown."""

import os
import re
import shutil
import sys
from io import BufferedWriter
from pathlib import Path
from typing import Any

from lit_sft.atomic import fsync
from lit_sft.errors import InputError
from lit_sft.redact import remember

try:
    from huggingface_hub import get_session
    from huggingface_hub.errors import HfHubHTTPError, HTTPError
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import get_token_to_send, logging
except ValueError as error:  # it reads the environment when it is imported
    raise InputError(f"a variable HF_… of the environment cannot be used: {error}; correct it, or unset it") from error

# a transfer that fails raises one of these; two are httpx's, a package whose name differs between client versions
FAILURES = (HTTPError, sys.modules[HTTPError.__module__.partition(".")[0]].InvalidURL, OSError, ValueError)
RESTARTS = 2  # of a body; the client itself has no limit while bytes come
AS_IT_IS = "identity"
logging.set_verbosity_error()  # the client's retries would be lines beside our one


def hub_token(given: str | None) -> str:
    """The token to send: the one ``given``, else the environment's or a stored one, "" for none.

    InputError when it cannot be one.
    """
    token = (get_token_to_send(given or None) or "").strip()
    remember(token)
    if not re.fullmatch(r"[!-~]*", token):
        raise InputError("the Hub token contains a character that no token has; copy it again")
    return token


def fetch_url(url: str, path: Path) -> Path:
    """Fetch a file from an http(s) address to ``path``, which is returned; replaced only by a whole file.

    No token is sent. InputError: the address is not one, or does not give the file.
    """
    if not re.fullmatch(r"https?://[^\s/:?#]+(:\d+)?([/?#]\S*)?", url):
        raise InputError(f"{url!r} is not an http or https address")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        transfer(url, partial, {}, None, path.name)
        fsync(partial)
        return partial.rename(path)
    except FAILURES as error:
        if getattr(error, "errno", None):  # the disk's, not the network's
            raise
        raise InputError(f"{url} cannot be fetched: {said(error)}; check the address and the network") from None
    finally:
        partial.unlink(missing_ok=True)


class _Bounded:
    """A file for the client to write to, which takes ``size`` bytes and no more: a server may never end.

    Nor is it emptied for ever, for servers that break off and cannot go on.
    """

    def __init__(self, file: BufferedWriter, size: int, told: str) -> None:
        self.file, self.size, self.told, self.times = file, size, told, 0
        self.tell, self.seek = file.tell, file.seek

    def write(self, chunk: bytes) -> int:
        if self.tell() + len(chunk) > self.size:
            Path(self.file.name).unlink()  # nothing to go on with
            raise InputError(self.told)
        return self.file.write(chunk)

    def truncate(self) -> int:
        self.times += 1
        if self.times > RESTARTS:
            raise ValueError("the body breaks off each time, and then begins anew")
        return self.file.truncate()


def _refuse_compressed(response: Any) -> None:
    """Of a body that was asked for as it is: nobody has stated how long a compressed one will become."""
    encoding = response.headers.get("Content-Encoding", AS_IT_IS)
    if response.request.headers.get("Accept-Encoding") == AS_IT_IS != encoding:
        raise InputError(f"{response.url} gives a compressed body ({encoding}) unasked; get that file otherwise")


def transfer(url: str, partial: Path, headers: dict[str, str], size: int | None, name: str) -> None:
    """Append to ``partial`` what it lacks of ``size`` bytes; one of FAILURES when the connection does not give it.

    Without a size half of the room on the disk is the most. InputError when more comes: none of it is kept.
    """
    if partial.is_file() and partial.stat().st_size > (size or 0):
        partial.unlink()
    most = shutil.disk_usage(partial.parent).free // 2 if size is None else size
    told = "half of the disk's free room" if size is None else "what the Hub states"
    hooks = get_session().event_hooks["response"]
    if _refuse_compressed not in hooks:
        hooks.append(_refuse_compressed)
    headers = headers | {"Accept-Encoding": AS_IT_IS}  # the rest of a compressed body could not be asked for
    with partial.open("ab") as file:
        bounded = _Bounded(file, most, f"{url} gives more than {most:,} bytes, {told}; get that file otherwise")
        start = file.tell()
        http_get(url, bounded, resume_size=start, headers=headers, expected_size=size, displayed_filename=name)


def said(error: Exception) -> str:
    """The error on one line; of an HTTP status only that, as the client's own text is long and advises wrongly."""
    if isinstance(error, HfHubHTTPError):
        return f"it answers {error.response.status_code} ({error.response.reason_phrase})"
    return "the body has the wrong length" if type(error) is OSError else f"{type(error).__name__}: {error}"
