"""A Hub on this machine: the HTTP endpoints that huggingface_hub and datasets use, with the faults a real one has.

By hand, over folders that hold ORG/NAME/ repositories:

    python tests/hub_server.py --models DIR --datasets DIR --port 8000
    HF_ENDPOINT=http://127.0.0.1:8000 python scripts/download.py --repo_id ORG/NAME

In tests ``with HubServer({"ORG/NAME": Repo({"config.json": b"{}"})}) as hub`` serves at ``hub.url`` and keeps every
request in ``hub.requests``. The clients read HF_ENDPOINT when they are imported, so commands run as subprocesses.

Like the Hub, it answers for a gated repository's description to anybody, for its files only with a token; keeps big
and binary files in LFS, whose address redirects to another origin; and says 401 for what does not exist to whom it
does not know.
"""

import argparse
import gzip
import hashlib
import io
import json
import re
import shutil
import threading
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import BinaryIO
from urllib.parse import parse_qs, quote, unquote, urlsplit

LFS = re.compile(r".*\.(safetensors|bin|model|pth|pt|gguf|onnx|parquet)")
CHUNK = 1 << 20


@dataclass
class File:
    """A file of a repository, given as its bytes or where it lies."""

    source: bytes | Path

    @cached_property
    def size(self) -> int:
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size

    def open(self) -> BinaryIO:
        return io.BytesIO(self.source) if isinstance(self.source, bytes) else self.source.open("rb")

    @cached_property
    def sha256(self) -> str:
        with self.open() as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @cached_property
    def git_sha1(self) -> str:
        with self.open() as file:
            return hashlib.sha1(b"blob %d\0" % self.size + file.read()).hexdigest()

    def describe(self, name: str) -> dict:
        """The file as the tree listing shows it."""
        entry = {"type": "file", "path": name, "size": self.size}
        if LFS.fullmatch(name):
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n"
            entry["oid"] = File(pointer.encode()).git_sha1
            return entry | {"lfs": {"oid": self.sha256, "size": self.size, "pointerSize": len(pointer)}}
        return entry | {"oid": self.git_sha1}


@dataclass
class Fault:
    """What goes wrong with a file (or with the name "api"), for the first ``times`` requests.

    ``kind``: a status such as "429" or "500"; "hang"; "short" (the connection breaks halfway through the body);
    "flipped" (a bit of the body differs); "endless" (chunks without end); "gzip" (a compressed body that nobody asked
    for); "again" (the body breaks off, and no range of it is to be had).
    """

    kind: str
    times: int = 1_000_000
    retry_after: int | None = None


@dataclass
class Repo:
    """A repository: name → content on the branch main, and on others; gated when it has a token."""

    files: dict[str, bytes | Path]
    branches: dict[str, dict[str, bytes | Path]] = field(default_factory=dict)
    token: str | None = None
    faults: dict[str, Fault] = field(default_factory=dict)
    description: bytes | None = None
    """What the Hub says of it in place of the truth."""

    @classmethod
    def from_folder(cls, folder: Path) -> "Repo":
        """Every file below ``folder``, dot files aside."""
        paths = [path for path in folder.rglob("*") if path.is_file()]
        names = {path.relative_to(folder).as_posix(): path for path in sorted(paths)}
        return cls({name: path for name, path in names.items() if not re.search(r"(^|/)\.", name)})

    @cached_property
    def revisions(self) -> dict[str, dict[str, File]]:
        """Branch or commit → its files."""
        found = {}
        for branch, files in {"main": self.files, **self.branches}.items():
            content = {name: File(source) for name, source in files.items()}
            identity = json.dumps([branch, [[name, file.sha256] for name, file in content.items()]])
            found[branch] = found[hashlib.sha1(identity.encode()).hexdigest()] = content
        return found

    def commit(self, revision: str) -> str:
        """The commit that a branch or a commit means; KeyError when there is none."""
        content = self.revisions[revision]
        return next(name for name, files in self.revisions.items() if files is content and len(name) == 40)

    def take_fault(self, name: str) -> Fault | None:
        """The fault this request meets, if any."""
        fault = self.faults.get(name)
        if fault is None or fault.times <= 0:
            return None
        fault.times -= 1
        return fault


@dataclass(frozen=True)
class Request:
    """What a client asked, and whether it sent a token with it."""

    method: str
    path: str
    range: str | None
    authorized: bool


class HubServer:
    """Serves ``models`` and ``datasets`` (ORG/NAME → Repo) on 127.0.0.1, on a free port unless told."""

    def __init__(self, models: dict[str, Repo], datasets: dict[str, Repo] | None = None, port: int = 0) -> None:
        self.repos = {"models": models, "datasets": datasets or {}}
        self.requests: list[Request] = []
        self.stopping = threading.Event()
        self.http = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (_Handler,), {"hub": self}))
        self.http.daemon_threads = True
        self.port = self.http.server_port
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self.http.shutdown()
        self.http.server_close()

    def fetched(self) -> list[str]:
        """Names of the files whose bodies were asked for, in order."""
        asked = (re.search(r"/resolve/[^/]+/(.+)", r.path) for r in self.requests if r.method == "GET")
        return [unquote(match[1]) for match in asked if match]


class _Refusal(Exception):  # noqa: N818 (the server's answer, no error of ours)
    """An answer other than the one hoped for: its status and, as the Hub's headers say it, why."""

    def __init__(self, status: int, code: str | None, message: str, headers: dict[str, str] | None = None) -> None:
        self.status, self.message = status, message
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.form = parse_qs(self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode())
        authorized = "Authorization" in self.headers
        self.hub.requests.append(Request(self.command, self.path, self.headers.get("Range"), authorized))
        try:
            self.route(urlsplit(self.path).path, parse_qs(urlsplit(self.path).query))
        except _Refusal as refusal:
            self.send_json({"error": refusal.message}, refusal.status, refusal.headers)
        except (BrokenPipeError, ConnectionResetError):  # the client is gone; so is the connection
            self.close_connection = True

    def route(self, path: str, query: dict[str, list[str]]) -> None:
        if match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(\w[\w-]+)/([^/]+)(/.*)?)?", path):
            kind, repo_id, action, revision, below = match.groups()
            repo = self.find(kind, repo_id)
            commit, files = self.at(repo, unquote(revision or "main"))
            self.meet_fault(repo, "api")
            headers = {"X-Repo-Commit": commit}
            if action in (None, "revision") and repo.description is not None:
                self.send_body(repo.description, 200, headers)
            elif action in (None, "revision"):
                self.send_json(self.info(repo_id, repo, commit, files, "blobs" in query), headers=headers)
            elif action == "tree":
                recursive = query.get("recursive") in (["true"], ["True"], ["1"])
                self.send_json(self.tree(files, unquote(below or "").strip("/"), recursive), headers=headers)
            elif action == "paths-info":
                everything = {entry["path"]: entry for entry in self.tree(files, "", recursive=True)}
                wanted = [name.strip("/") for name in self.form.get("paths", [])]
                self.send_json([everything[name] for name in wanted if name in everything], headers=headers)
            else:
                raise _Refusal(404, None, f"no endpoint {action} here")
        elif match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            kind, repo_id, revision, name = match.groups()
            repo = self.find("datasets" if kind else "models", repo_id, files=True)
            commit, files = self.at(repo, unquote(revision))
            if (name := unquote(name)) not in files:
                raise _Refusal(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
            self.resolve(kind or "", repo_id, repo, commit, name, files[name])
        elif match := re.fullmatch(r"/cdn/(models|datasets)/([^/]+/[^/]+)/([^/]+)/(.+)", path):
            kind, repo_id, revision, name = match.groups()
            repo = self.hub.repos[kind][repo_id]
            self.send_file(repo, unquote(name), repo.revisions[revision][unquote(name)], {})
        else:
            raise _Refusal(404, None, "Sorry, we can't find the page you are looking for.")

    def find(self, kind: str, repo_id: str, files: bool = False) -> Repo:
        """The repository, if the client may see it (its ``files``: if it may read them)."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and not token.startswith("hf_"):
            raise _Refusal(401, None, "Invalid credentials in Authorization header")
        repo = self.hub.repos[kind].get(repo_id)
        if repo is None:
            status, message = (404, "Repository not found") if token else (401, "Invalid username or password.")
            raise _Refusal(status, "RepoNotFound", message)
        if files and repo.token and token != repo.token:
            message = f"Access to {kind[:-1]} {repo_id} is restricted"
            raise _Refusal(403 if token else 401, "GatedRepo", message)
        return repo

    def at(self, repo: Repo, revision: str) -> tuple[str, dict[str, File]]:
        if revision not in repo.revisions:
            raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repo.commit(revision), repo.revisions[revision]

    def meet_fault(self, repo: Repo, name: str) -> Fault | None:
        """Refuse or hang if that is the fault; otherwise hand it over."""
        fault = repo.take_fault(name)
        if fault and fault.kind == "hang":
            self.hub.stopping.wait(60)
            raise ConnectionResetError
        if fault and fault.kind.isdigit():
            headers = {"Retry-After": str(fault.retry_after)} if fault.retry_after is not None else {}
            raise _Refusal(int(fault.kind), None, "Something is wrong on our side", headers)
        return fault

    def info(self, repo_id: str, repo: Repo, commit: str, files: dict[str, File], blobs: bool) -> dict:
        siblings = []
        for name, file in files.items():
            sibling = {"rfilename": name}
            if blobs:
                entry = file.describe(name)
                sibling |= {"size": entry["size"], "blobId": entry["oid"]}
                if lfs := entry.get("lfs"):
                    sibling["lfs"] = {"sha256": lfs["oid"], "size": lfs["size"], "pointerSize": lfs["pointerSize"]}
            siblings.append(sibling)
        gated = "manual" if repo.token else False
        return {"id": repo_id, "sha": commit, "private": False, "gated": gated, "tags": [], "siblings": siblings}

    def tree(self, files: dict[str, File], below: str, recursive: bool) -> list[dict]:
        entries = {}
        for name, file in files.items():
            if below and name != below and not name.startswith(below + "/"):
                continue
            inner = name[len(below) :].lstrip("/").split("/")
            for depth in range(1, len(inner)):
                folder = "/".join(filter(None, [below, *inner[:depth]]))
                if recursive or depth == 1:
                    oid = hashlib.sha1(folder.encode()).hexdigest()
                    entries[folder] = {"type": "directory", "path": folder, "oid": oid, "size": 0}
            if recursive or len(inner) == 1:
                entries[name] = file.describe(name)
        if below and not entries:
            raise _Refusal(404, "EntryNotFound", f"{below} does not exist")
        return list(entries.values())

    def resolve(self, kind: str, repo_id: str, repo: Repo, commit: str, name: str, file: File) -> None:
        headers = {"X-Repo-Commit": commit}
        if not LFS.fullmatch(name):
            self.send_file(repo, name, file, headers | {"ETag": f'"{file.git_sha1}"'})
            return
        # localhost is another origin than 127.0.0.1: a client must not send its token there
        address = f"/cdn/{'datasets' if kind else 'models'}/{repo_id}/{commit}/{quote(name)}"
        headers |= {"X-Linked-Size": str(file.size), "X-Linked-ETag": f'"{file.sha256}"'}
        self.send_head(302, headers | {"Location": f"http://localhost:{self.hub.port}{address}", "Content-Length": "0"})

    def send_file(self, repo: Repo, name: str, file: File, headers: dict[str, str]) -> None:
        fault = self.meet_fault(repo, name) if self.command == "GET" else None
        start, end = 0, file.size
        if fault and fault.kind == "again":
            del self.headers["Range"]
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, end = int(match[1]), min(int(match[2] or file.size) + bool(match[2]), file.size)
            headers |= {"Content-Range": f"bytes {start}-{end - 1}/{file.size}"}
            if start >= end:
                raise _Refusal(416, None, "Range not satisfiable", {"Content-Range": f"bytes */{file.size}"})
        if fault and fault.kind == "endless":
            self.send_head(200, headers | {"Transfer-Encoding": "chunked"})
            while not self.hub.stopping.is_set():
                self.wfile.write(b"%x\r\n%b\r\n" % (CHUNK, bytes(CHUNK)))
        if fault and fault.kind == "gzip":
            self.send_body(gzip.compress(bytes(9 * CHUNK)), 200, headers | {"Content-Encoding": "gzip"})
            return
        headers |= {"Content-Length": str(end - start), "Accept-Ranges": "bytes"}
        self.send_head(206 if "Content-Range" in headers else 200, headers)
        if self.command == "HEAD":
            return
        with file.open() as content:
            content.seek(start)
            if fault and fault.kind in ("short", "again"):
                self.wfile.write(content.read((end - start) // 2))
                self.close_connection = True
            elif fault and fault.kind == "flipped":
                body = bytearray(content.read(end - start))
                body[len(body) // 2] ^= 1
                self.wfile.write(body)
            elif end == file.size:
                shutil.copyfileobj(content, self.wfile, CHUNK)
            else:
                self.wfile.write(content.read(end - start))

    def send_head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()

    def send_json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_body(json.dumps(value).encode(), status, headers or {})

    def send_body(self, body: bytes, status: int, headers: dict[str, str]) -> None:
        kind = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        self.send_head(status, kind | headers)
        if self.command != "HEAD":
            self.wfile.write(body)


def repositories(folder: Path | None) -> dict[str, Repo]:
    """Every ORG/NAME/ of ``folder``."""
    found = sorted(folder.glob("*/*/")) if folder else []
    return {f"{path.parent.name}/{path.name}": Repo.from_folder(path) for path in found}


def main() -> None:
    """Serve two folders until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="folder of ORG/NAME/ model repositories")
    parser.add_argument("--datasets", type=Path, help="folder of ORG/NAME/ dataset repositories")
    parser.add_argument("--port", type=int, default=0, help="port on 127.0.0.1 (default: a free one)")
    args = parser.parse_args()
    models, datasets = repositories(args.models), repositories(args.datasets)
    with HubServer(models, datasets, args.port) as hub:
        print(f"export HF_ENDPOINT={hub.url}\nmodels: {', '.join(models) or 'none'}")
        print(f"datasets: {', '.join(datasets) or 'none'}", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print()


if __name__ == "__main__":
    main()
