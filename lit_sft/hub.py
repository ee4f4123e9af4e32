"""The Hub: files come in, each verified before it gets its final name.

Its HTTP client, retries and tokens are used, its download into a folder is not: that forgets partial files when a run
ends, and never compares what came with the hash that the Hub states.
"""

import hashlib
import json
import re
import shlex
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lit_sft.args import DownloadArgs
from lit_sft.atomic import fsync, sha256_of, write_atomically
from lit_sft.errors import InputError
from lit_sft.families.repositories import REPOSITORIES
from lit_sft.layout import (
    CHECKPOINTS,
    DOWNLOAD_RECORD,
    HF_CONFIG,
    HF_INDEX,
    HF_PICKLE,
    HF_PICKLE_INDEX,
    HF_WEIGHTS,
    MANIFEST,
    TOKENIZER_FILES,
)
from lit_sft.locks import lock
from lit_sft.redact import without_secrets
from lit_sft.transfer import FAILURES, hub_token, said, transfer
from lit_sft.weight_files import choose_weights, missing_files

# isort: split
# after transfer, which says what is wrong with the environment that this reads when it is imported
from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import build_hf_headers

SMALL_FILES = {HF_CONFIG, *TOKENIZER_FILES}
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")  # one of them is enough
WEIGHTS = (HF_WEIGHTS, HF_PICKLE)  # unless they are sharded
SHARDS = {HF_INDEX: r"model-\d+-of-\d+\.safetensors", HF_PICKLE_INDEX: r"pytorch_model-\d+-of-\d+\.bin"}
NO_RECORD = {"repo_id": None, "revision": None, "commit": None, "files": {}}
NONSENSE = (TypeError, KeyError, AttributeError, RecursionError)  # what the client raises for JSON that no Hub sends


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
    token = hub_token(args.access_token)
    directory = Path(args.checkpoint_dir or CHECKPOINTS / args.repo_id)
    record = _read_record(directory)
    if record["repo_id"] not in (None, args.repo_id):
        raise InputError(f"{directory} holds {record['repo_id']}; name another --checkpoint_dir for {args.repo_id}")
    try:
        present, commit = _describe(args, token)
        plan = _choose(args, present)
        address = hf_hub_url(args.repo_id, HF_CONFIG, revision=commit)
        get_hf_file_metadata(address, token=token or False, timeout=constants.HF_HUB_ETAG_TIMEOUT)  # may we read it?
    except FAILURES as error:
        cause, temporary = _explain(error, args, token)
        lacks = _missing(directory, record)
        if args.revision not in (None, record["revision"], record["commit"]):
            lacks.append(f"a record that it is revision {args.revision}")
        if temporary and directory.is_dir() and lacks:
            cause += f"; {directory} lacks {', '.join(lacks)}"
        if not temporary or lacks:
            raise InputError(cause) from None
        print(f"{without_secrets(cause)}\nNot needed: {directory} is complete.")
    else:
        record = _with_own(directory, record, plan, commit, args)
        with lock(directory):
            _settle(directory, record, plan, commit, args)
            _fetch(directory, plan, commit, args, token)
            if more := [name for name in _shards_in_plan(directory, plan) if name in present.keys() - plan.keys()]:
                plan |= _facts(present, more)  # the index, now here, calls them otherwise than most do
                _settle(directory, _read_record(directory), plan, commit, args)
                _fetch(directory, plan, commit, args, token)
            if lacks := _missing(directory, _read_record(directory)):
                raise InputError(f"{args.repo_id} is itself incomplete: it lacks {', '.join(lacks)}")
    if note := choose_weights(directory).note(directory):
        print(f"notice: {note}")
    print(f"files: {directory}")
    print(f"next: python scripts/convert_hf_checkpoint.py --checkpoint_dir {shlex.quote(str(directory))}")
    return directory


def _describe(args: DownloadArgs, token: str) -> tuple[dict[str, RepoSibling], str]:
    """Name → file of the repository, and its commit; one of FAILURES, or InputError for what is no description."""
    api, strange = HfApi(token=token or False), f"{constants.ENDPOINT} describes {args.repo_id} as no Hub does"
    try:
        timeout = constants.HF_HUB_ETAG_TIMEOUT
        info = api.model_info(args.repo_id, revision=args.revision, files_metadata=True, timeout=timeout)
    except NONSENSE as error:
        raise InputError(f"{strange} ({type(error).__name__}: {error}); set HF_ENDPOINT to a real Hub") from error
    files, commit = info.siblings or [], info.sha
    if not (isinstance(commit, str) and re.fullmatch(r"[0-9a-f]{40}", commit)):
        raise InputError(f"{strange} (its commit is {commit!r}); set HF_ENDPOINT to a real Hub")
    if unnamed := [file.rfilename for file in files if not isinstance(file.rfilename, str)]:
        raise InputError(f"{strange} (a file's name is {unnamed[0]!r}); set HF_ENDPOINT to a real Hub")
    return {file.rfilename: file for file in files}, commit


def _choose(args: DownloadArgs, present: dict[str, RepoSibling]) -> dict[str, dict]:
    """Name → bytes and hash of what to take. Only plain names are ever matched, so none can leave the directory."""
    weights = _choose_weights(set(present), args.from_safetensors)
    lacks = [] if weights else [" or ".join(WEIGHTS if args.from_safetensors else WEIGHTS[1:])]
    lacks += [] if HF_CONFIG in present else [HF_CONFIG]
    lacks += [] if any(name in present for name in TOKENIZERS) else [" or ".join(TOKENIZERS)]
    if lacks:
        raise InputError(f"{args.repo_id} has no {', no '.join(lacks)}: no checkpoint that can be converted")
    return _facts(present, (*weights, *(SMALL_FILES & present.keys())))


def _facts(present: dict[str, RepoSibling], names: Iterable[str]) -> dict[str, dict]:
    """Name → bytes and hash of files of the repository."""
    taken = [present[name] for name in names]
    plan = {f.rfilename: {"bytes": f.size, "hash": f.lfs.sha256 if f.lfs else f.blob_id} for f in taken}
    for name, fact in plan.items():
        if not _is_fact(fact):
            raise InputError(f"{constants.ENDPOINT} states no size and hash of {name}; set HF_ENDPOINT to a real Hub")
    return plan


def _choose_weights(present: set[str], from_safetensors: bool) -> list[str]:
    """The files of weights to take, in the order in which transformers looks for them; none: there are none."""
    for single, index in ((HF_WEIGHTS, HF_INDEX), (HF_PICKLE, HF_PICKLE_INDEX)):
        if single == HF_WEIGHTS and not from_safetensors:
            continue
        if single in present:
            return [single]
        if index in present:
            return [index, *(name for name in present if re.fullmatch(SHARDS[index], name, re.ASCII))]
    return []


def _is_fact(fact: Any) -> bool:
    """Whether this says bytes and hash of a file."""
    size, digest = (fact.get("bytes"), fact.get("hash")) if isinstance(fact, dict) else (None, None)
    known = isinstance(digest, str) and re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", digest)
    return type(size) is int and 0 <= size < 2**63 and bool(known)


def _with_own(directory: Path, record: dict, plan: dict[str, dict], commit: str, args: DownloadArgs) -> dict:
    """The record; of a directory without one, that its files of the planned names are the Hub's, as they must be.

    Otherwise they are somebody's own, which nothing may replace: InputError.
    """
    if record["commit"] is not None:
        return record
    here = [name for name in sorted(plan) if (directory / name).is_file()]
    if own := [name for name in here if not _is_right(directory / name, plan[name])]:
        told = f"{directory} holds {', '.join(own)} of its own, other than {args.repo_id} has, and no record"
        raise InputError(f"{told}; name another --checkpoint_dir, or move them away")
    return NO_RECORD | {"commit": commit, "files": {name: plan[name] for name in here}}


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
            transfer(url, partial, headers, plan[name]["bytes"], name)
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
    """What an earlier run wrote down; its fields are there, and empty, when there was none or it is damaged."""
    try:
        record = NO_RECORD | json.loads((directory / DOWNLOAD_RECORD).read_text())
    except (OSError, ValueError, TypeError, RecursionError):
        return NO_RECORD
    texts = [record[name] for name in ("repo_id", "revision", "commit")]
    files = record["files"].items() if isinstance(record["files"], dict) else [("/", None)]
    sound = all(isinstance(text, str | None) for text in texts) and all(
        Path(name).name == name and _is_fact(fact) for name, fact in files
    )
    return record if sound else NO_RECORD


def _missing(directory: Path, record: dict) -> list[str]:
    """What the directory lacks of its record, and of what every checkpoint needs."""
    here = {path.name for path in directory.glob("*") if path.is_file()}
    lacks = {name for name, fact in record["files"].items() if not _is_right(directory / name, fact, fact)}
    try:
        lacks |= set(missing_files(directory))
    except InputError:
        lacks.add(f"a readable {HF_CONFIG}")
    lacks |= {HF_CONFIG} - here | (set() if here & {*TOKENIZERS} else {" or ".join(TOKENIZERS)})
    return sorted(lacks)


def _shards_in_plan(directory: Path, plan: dict[str, dict]) -> list[str]:
    """The shards that a downloaded index names, plain names only."""
    index = next((name for name in SHARDS if name in plan), None)
    if index is None:
        return []
    try:
        named = {*json.loads((directory / index).read_text())["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []
    return sorted(name for name in named if isinstance(name, str) and Path(name).name == name)


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
        return f"{hub} refuses {args.repo_id}: {said(error)}", False
    wait = response.headers.get("Retry-After") if response is not None else None
    hint = f"wait {wait} s" if wait else "wait a little" if status else "check the network"
    return f"{hub} cannot be read: {said(error)}; {hint} and run again, what came is kept", True
