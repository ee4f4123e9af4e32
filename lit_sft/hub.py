"""The Hub: files come in, each verified before it gets its final name.

Its HTTP client, retries and tokens are used, its download into a folder is not: that forgets partial files when a run
ends, and never compares what came with the hash that the Hub states.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
from pathlib import Path

from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HTTPError, RevisionNotFoundError
from huggingface_hub.file_download import http_get
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import build_hf_headers, get_token_to_send

from lit_sft.args import DownloadArgs
from lit_sft.atomic import fsync, sha256_of, write_atomically
from lit_sft.errors import InputError
from lit_sft.families.repositories import REPOSITORIES
from lit_sft.layout import CHECKPOINTS, DOWNLOAD_RECORD, HF_CONFIG, MANIFEST, TOKENIZER_FILES
from lit_sft.locks import lock

SMALL_FILES = {HF_CONFIG, *TOKENIZER_FILES}
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")  # one of them is enough
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # unless they are sharded
SAFETENSORS = r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?"
PICKLED = r"pytorch_model(-\d+-of-\d+)?\.bin(\.index\.json)?"
NO_RECORD = {"repo_id": None, "revision": None, "commit": None, "files": {}}
# a transfer that fails raises one of these; HTTPError is httpx's, a package whose name differs between client versions
FAILURES = (HTTPError, OSError, ValueError)


def list_models() -> str:
    """The repositories known to convert, a section per family."""
    sections = [f"{family}\n" + "\n".join(f"  {name}" for name in names) for family, names in REPOSITORIES.items()]
    return "\n\n".join([*sections, "Others of their architectures convert too: give any ORG/MODEL as --repo_id."])


def download(args: DownloadArgs) -> Path:
    """Fetch ``args.repo_id`` into its checkpoint directory, which is returned; what is there and right stays.

    A partial file is continued. Without a network a complete directory is enough. InputError: the repository, its
    revision, access or a needed file is missing, the transfer failed, or a file is not what the Hub says it is.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", args.repo_id or "", re.ASCII):
        raise InputError(f"--repo_id {args.repo_id!r} is not of the form ORG/MODEL; without it, known ones are listed")
    token = (get_token_to_send(args.access_token or None) or "").strip()
    if not re.fullmatch(r"[!-~]*", token):
        raise InputError("the Hub token contains a character that no token has; copy it again")
    directory = Path(args.checkpoint_dir or CHECKPOINTS / args.repo_id)
    record = _read_record(directory)
    if record["repo_id"] not in (None, args.repo_id):
        raise InputError(f"{directory} holds {record['repo_id']}; name another --checkpoint_dir for {args.repo_id}")
    try:
        api, seconds = HfApi(token=token or False), constants.HF_HUB_ETAG_TIMEOUT
        info = api.model_info(args.repo_id, revision=args.revision, files_metadata=True, timeout=seconds)
        plan = _choose(args, {file.rfilename: file for file in info.siblings or ()})
        address = hf_hub_url(args.repo_id, HF_CONFIG, revision=info.sha)
        get_hf_file_metadata(address, token=token or False, timeout=seconds)  # may we read it? ask before writing
    except FAILURES as error:
        cause, temporary = _explain(error, args, token)
        lacks = _missing(directory, record)
        if args.revision not in (None, record["revision"], record["commit"]):
            lacks.append(f"a record that it is revision {args.revision}")
        if temporary and directory.is_dir() and lacks:
            cause += f"; {directory} lacks {', '.join(lacks)}"
        if not temporary or lacks:
            raise InputError(cause) from None
        print(f"{cause}\nNot needed: {directory} is complete.")
    else:
        with lock(directory):
            _settle(directory, record, plan, info.sha, args)
            _fetch(directory, plan, info.sha, args, token)
            if lacks := _missing(directory, _read_record(directory)):
                raise InputError(f"{args.repo_id} is itself incomplete: it lacks {', '.join(lacks)}")
    print(f"files: {directory}")
    print(f"next: python scripts/convert_hf_checkpoint.py --checkpoint_dir {shlex.quote(str(directory))}")
    return directory


def fetch_url(url: str, path: Path) -> Path:
    """Fetch a file from an http(s) address to ``path``, which is returned; replaced only by a whole file.

    No token is sent. InputError: the address is not one, or does not give the file.
    """
    if not re.fullmatch(r"https?://[^\s/:?#]+(:\d+)?([/?#]\S*)?", url):
        raise InputError(f"{url!r} is not an http or https address")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        _transfer(url, partial, {}, None, path.name)
        fsync(partial)
        return partial.rename(path)
    except FAILURES as error:
        if getattr(error, "errno", None):  # the disk's, not the network's
            raise
        raise InputError(f"{url} cannot be fetched: {_said(error)}; check the address and the network") from None
    finally:
        partial.unlink(missing_ok=True)


def _choose(args: DownloadArgs, present: dict[str, RepoSibling]) -> dict[str, dict]:
    """Name → bytes and hash of what to take. Only plain names are ever matched, so none can leave the directory."""
    safetensors, pickled = ([name for name in present if re.fullmatch(p, name)] for p in (SAFETENSORS, PICKLED))
    weights = safetensors if safetensors and args.from_safetensors else pickled
    lacks = [] if weights else [" or ".join(WEIGHTS if args.from_safetensors else WEIGHTS[1:])]
    lacks += [] if HF_CONFIG in present else [HF_CONFIG]
    lacks += [] if any(name in present for name in TOKENIZERS) else [" or ".join(TOKENIZERS)]
    if lacks:
        raise InputError(f"{args.repo_id} has no {', no '.join(lacks)}: no checkpoint that can be converted")
    taken = [present[name] for name in (*weights, *(SMALL_FILES & present.keys()))]
    plan = {f.rfilename: {"bytes": f.size, "hash": f.lfs.sha256 if f.lfs else f.blob_id} for f in taken}
    for name, fact in plan.items():
        if type(fact["bytes"]) is not int or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", str(fact["hash"])):
            raise InputError(f"{constants.ENDPOINT} states no size and hash of {name}; set HF_ENDPOINT to a real Hub")
    return plan


def _settle(directory: Path, record: dict, plan: dict[str, dict], commit: str, args: DownloadArgs) -> None:
    """Remove what is damaged or of another commit, then record the plan: from here on a file that is there is right."""
    known, here = record["files"], {path.name for path in directory.iterdir() if path.is_file()}
    kept = {} if record["commit"] != commit else {n: f for n, f in known.items() if _is_right(directory / n, f, f)}
    for name in here & (plan.keys() | known.keys()):
        if not _is_right(directory / name, (kept | plan).get(name), known.get(name)):
            (directory / name).unlink()
            (directory / MANIFEST).unlink(missing_ok=True)  # what was converted from it counts no longer
    record = {"repo_id": args.repo_id, "revision": args.revision or "main", "commit": commit, "files": kept | plan}
    write_atomically(directory / DOWNLOAD_RECORD, json.dumps(record, indent=2) + "\n")


def _fetch(directory: Path, plan: dict[str, dict], commit: str, args: DownloadArgs, token: str) -> None:
    """Fetch what is absent, small files first, each under its final name only once it is verified."""
    absent = [name for name in sorted(plan, key=lambda name: plan[name]["bytes"]) if not (directory / name).exists()]
    if (needed := sum(plan[name]["bytes"] for name in absent)) > (free := shutil.disk_usage(directory).free):
        raise InputError(f"{directory}: {needed / 1e9:.1f} GB to fetch but {free / 1e9:.1f} GB free; make room")
    for name in absent:
        path, partial = directory / name, directory / f".{name}.{plan[name]['hash'][:12]}.part"
        url, headers = hf_hub_url(args.repo_id, name, revision=commit), build_hf_headers(token=token or False)
        try:
            _transfer(url, partial, headers, plan[name]["bytes"], name)
        except FAILURES as error:
            if getattr(error, "errno", None):  # the disk's, not the network's
                raise
            raise InputError(f"{name}: {_explain(error, args, token)[0]}") from None
        if not _is_right(partial, plan[name]):
            partial.unlink()
            raise InputError(f"{path} came damaged (its hash is not the one the Hub states) and was deleted; run again")
        fsync(partial)
        partial.rename(path)
    for leftover in directory.glob(".*.part"):  # of another revision
        leftover.unlink()
    fsync(directory)
    print(f"{len(absent)} of {len(plan)} files fetched, commit {commit}")


def _transfer(url: str, partial: Path, headers: dict[str, str], size: int | None, name: str) -> None:
    """Append to ``partial`` what it lacks of ``size`` bytes; one of FAILURES when the connection does not give it."""
    if partial.is_file() and partial.stat().st_size > (size or 0):
        partial.unlink()
    headers = headers | {"Accept-Encoding": "identity"}  # the rest of a compressed body could not be asked for
    with partial.open("ab") as file:
        http_get(url, file, resume_size=file.tell(), headers=headers, expected_size=size, displayed_filename=name)


def _is_right(path: Path, fact: dict | None, known: dict | None = None) -> bool:
    """Whether a file is as the Hub states it; not hashed if an earlier run verified it as just that (``known``)."""
    if fact is None or not path.is_file() or path.stat().st_size != fact["bytes"]:
        return False
    if known == fact:
        return True
    if len(fact["hash"]) == 64:  # a file in LFS has its sha256, others have git's hash
        return sha256_of(path) == fact["hash"]
    return hashlib.sha1(b"blob %d\0" % fact["bytes"] + path.read_bytes()).hexdigest() == fact["hash"]


def _read_record(directory: Path) -> dict:
    """What an earlier run wrote down; its fields are there, and empty, when there was none."""
    try:
        return NO_RECORD | json.loads((directory / DOWNLOAD_RECORD).read_text())
    except (OSError, ValueError, TypeError, RecursionError):
        return NO_RECORD


def _missing(directory: Path, record: dict) -> list[str]:
    """What the directory lacks of its record, and of what every checkpoint needs."""
    here = {path.name for path in directory.glob("*") if path.is_file()}
    lacks = {name for name, fact in record["files"].items() if not _is_right(directory / name, fact, fact)}
    try:
        indexes = [directory / name for weights in WEIGHTS if (name := f"{weights}.index.json") in here]
        choices = [{*json.loads(index.read_text())["weight_map"].values()} - here for index in indexes]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return [*lacks, "a readable weight index"]
    choices += [{name} - here for name in WEIGHTS]
    lacks |= choices[0] if all(choices) else set()
    lacks |= {HF_CONFIG} - here | (set() if here & {*TOKENIZERS} else {" or ".join(TOKENIZERS)})
    return sorted(lacks)


def _explain(error: Exception, args: DownloadArgs, token: str) -> tuple[str, bool]:
    """Why the Hub did not give it and what to do, on one line; and whether it may give it at another time."""
    hub, page = constants.ENDPOINT, f"{constants.ENDPOINT}/{args.repo_id}"
    response = error.response if isinstance(error, HfHubHTTPError) else None
    status = response.status_code if response is not None else None
    give = f"give a token (made at {hub}/settings/tokens) as HF_TOKEN or --access_token"
    if isinstance(error, GatedRepoError):
        have = "the token's account has no access yet, or the token itself must be allowed to read gated repositories"
        return f"{args.repo_id} is gated: accept its licence at {page}; {have if token else give}", False
    if isinstance(error, RevisionNotFoundError):
        return f"{args.repo_id} has no revision {args.revision!r}; {page}/tree/main lists its branches and tags", False
    if status == 401 and response.headers.get("X-Error-Message", "").startswith("Invalid credentials"):
        return f"{hub} does not know the token (status 401): wrong or expired; {give}", False
    if status in (401, 404):
        hidden = "the token's account must see it" if token else give
        return f"{hub} has no repository {args.repo_id} ({status}): check the name; if it is private, {hidden}", False
    if status not in (None, 408, 429) and status < 500:
        return f"{hub} refuses {args.repo_id}: {_said(error)}", False
    wait = response.headers.get("Retry-After") if response is not None else None
    hint = f"wait {wait} s" if wait else "wait a little" if status else "check the network"
    return f"{hub} cannot be read: {_said(error)}; {hint} and run again, what came is kept", True


def _said(error: Exception) -> str:
    """The error on one line; of an HTTP status only that, as the client's own text is long and advises wrongly."""
    if isinstance(error, HfHubHTTPError):
        return f"it answers {error.response.status_code} ({error.response.reason_phrase})"
    return "the body has the wrong length" if type(error) is OSError else f"{type(error).__name__}: {error}"
