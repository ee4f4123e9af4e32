"""lit_sft.hub against a Hub on this machine, with the real huggingface_hub and datasets."""

import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_server import Fault, HubServer, Repo

from lit_sft.errors import InputError
from lit_sft.families.repositories import REPOSITORIES

ROOT = Path(__file__).parent.parent
TOKEN = "hf_CanaryThatMustNeverBePrinted"
BASE = {"config.json": b'{"model_type": "llama"}', "tokenizer.model": b"pieces" * 100}
WEIGHTS = bytes(range(256)) * 4096  # 1 MiB


@dataclass
class Outcome:
    """How a command ended. ``text`` is all it said."""

    code: int
    stdout: str
    stderr: str

    @property
    def text(self) -> str:
        return self.stdout + self.stderr

    def error(self) -> str:
        """The one line that says what was wrong."""
        lines = [line for line in re.split(r"[\r\n]", self.stderr) if line.startswith("error: ")]
        assert self.code == 2 and len(lines) == 1, self.text
        assert "Traceback" not in self.text and TOKEN not in self.text
        return lines[0]

    def ok(self) -> str:
        assert self.code == 0 and TOKEN not in self.text, self.text
        return self.stdout


def environment(hub: str, home: Path, token: str | None, **more: str) -> dict[str, str]:
    """The variables of a subprocess that takes ``hub`` for the Hub: they are read when the clients are imported."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    ours = {"HF_ENDPOINT": hub, "HF_HOME": str(home), "HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "1"}
    return kept | ours | ({"HF_TOKEN": token} if token else {}) | {"PYTHONPATH": str(ROOT)} | more


@pytest.fixture
def download(tmp_path):
    """Runs scripts/download.py in ``tmp_path``, as a user would, against the Hub at the address given."""

    def run(url: str, *flags: str, token: str | None = None, **more: str) -> Outcome:
        env = environment(url, tmp_path / "hf", token, **more)
        command = [sys.executable, str(ROOT / "scripts/download.py"), *flags]
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=90)
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


def folder(tmp_path: Path, repo_id: str = "org/model") -> Path:
    return tmp_path / "checkpoints" / repo_id


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir() if not path.name.startswith(".")} - {"download.json"}


def test_safetensors_are_preferred_and_other_formats_left(download, tmp_path):
    wanted = BASE | {
        "generation_config.json": b"{}",
        "tokenizer.json": b"{}",
        "tokenizer_config.json": b"{}",
        "special_tokens_map.json": b"{}",
        "added_tokens.json": b"{}",
        "chat_template.jinja": b"{{ messages }}",
        "vocab.json": b"{}",
        "merges.txt": b"a b",
        "model-00001-of-00002.safetensors": WEIGHTS,
        "model-00002-of-00002.safetensors": WEIGHTS[1:],
        "model.safetensors.index.json": json.dumps(
            {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
        ).encode(),
    }
    left = (
        *("pytorch_model.bin", "training_args.bin", "consolidated.safetensors", "consolidated.00.pth", "README.md"),
        *("original/config.json", "original/model.safetensors", "onnx/model.onnx", "model.gguf", "adapter_model.bin"),
        *("../../escaped.json", "../../model.safetensors", "/tmp/config.json", "..\\tokenizer.json", "run.py"),
    )
    with HubServer({"org/model": Repo(wanted | dict.fromkeys(left, b"never"))}) as hub:
        said = download(hub.url, "--repo_id", "org/model").ok()
        assert sorted(hub.fetched()) == sorted(wanted)
        assert not any(r.authorized for r in hub.requests)
        assert "--checkpoint_dir checkpoints/org/model" in said
        assert {name: (folder(tmp_path) / name).read_bytes() for name in names(folder(tmp_path))} == wanted
        assert {path.name for path in tmp_path.iterdir()} <= {"checkpoints", "hf"}

        hub.requests.clear()
        (folder(tmp_path) / "vocab.json").write_bytes(b"[]!")
        assert "1 of" in download(hub.url, "--repo_id", "org/model").ok(), "only what is absent or damaged comes again"
        assert hub.fetched() == ["vocab.json"]


def test_bin_is_the_fallback_and_the_choice(download, tmp_path):
    repos = {
        "org/old": Repo(BASE | {"pytorch_model.bin": WEIGHTS, "training_args.bin": b"never"}),
        "org/both": Repo(BASE | {"pytorch_model.bin": WEIGHTS, "model.safetensors": WEIGHTS[1:]}),
    }
    with HubServer(repos) as hub:
        download(hub.url, "--repo_id", "org/old").ok()
        assert names(folder(tmp_path, "org/old")) == {*BASE, "pytorch_model.bin"}
        download(hub.url, "--repo_id", "org/both", "--from_safetensors", "false", "--checkpoint_dir", "a b").ok()
        assert names(tmp_path / "a b") == {*BASE, "pytorch_model.bin"}
        assert "'a b'" in download(hub.url, "--repo_id", "org/both", "--checkpoint_dir", "a b").ok()
        assert names(tmp_path / "a b") == {*BASE, "pytorch_model.bin", "model.safetensors"}
        assert "holds org/both" in download(hub.url, "--repo_id", "org/old", "--checkpoint_dir", "a b").error()


def test_one_set_of_weights_is_taken_in_transformers_order(download, tmp_path):
    """A single file before shards, whose names are those of the index; what lies in the folder besides is named."""
    names_of_shards = ["model-1-of-2.safetensors", "part-two.safetensors"]
    index = json.dumps({"weight_map": dict(zip("ab", names_of_shards, strict=True))}).encode()
    shards = {"model.safetensors.index.json": index, **dict.fromkeys(names_of_shards, WEIGHTS)}
    pickled = {"pytorch_model.bin": WEIGHTS, "pytorch_model.bin.index.json": index, "pytorch_model-1-of-1.bin": WEIGHTS}
    repos = {
        "org/all": Repo(BASE | shards | pickled | {"model.safetensors": WEIGHTS}),
        "org/shards": Repo(BASE | shards | pickled),
        "org/lone": Repo(BASE | {"model-1-of-2.safetensors": WEIGHTS, "pytorch_model.bin": WEIGHTS}),
        "org/cut": Repo(BASE | {name: shards[name] for name in list(shards)[:2]}),
    }
    with HubServer(repos) as hub:
        download(hub.url, "--repo_id", "org/all").ok()
        assert names(folder(tmp_path, "org/all")) == {*BASE, "model.safetensors"}
        download(hub.url, "--repo_id", "org/all", "--from_safetensors", "false", "--checkpoint_dir", "bin").ok()
        assert names(tmp_path / "bin") == {*BASE, "pytorch_model.bin"}
        folder(tmp_path, "org/shards").mkdir(parents=True)
        (folder(tmp_path, "org/shards") / "model.safetensors").write_bytes(b"mine")
        said = download(hub.url, "--repo_id", "org/shards").ok()
        assert names(folder(tmp_path, "org/shards")) == {*BASE, *shards, "model.safetensors"}
        assert "model.safetensors is read; model.safetensors.index.json, model-1-of-2.safetensors, part-two" in said
        download(hub.url, "--repo_id", "org/lone").ok()
        assert names(folder(tmp_path, "org/lone")) == {*BASE, "pytorch_model.bin"}
        error = download(hub.url, "--repo_id", "org/cut").error()
        assert "org/cut is itself incomplete: it lacks part-two.safetensors" in error


def test_an_unusable_repository_is_refused_before_anything_is_written(download, tmp_path):
    repos = {"org/gguf": Repo({"model.gguf": WEIGHTS, "README.md": b""}), "org/lone": Repo({"model.safetensors": b"x"})}
    with HubServer(repos) as hub:
        error = download(hub.url, "--repo_id", "org/gguf").error()
        assert "no model.safetensors or pytorch_model.bin" in error and "no config.json" in error
        assert "--repo_id '../../etc'" in download(hub.url, "--repo_id", "../../etc").error()
        assert hub.fetched() == [] and not (tmp_path / "checkpoints").exists()


def test_a_cut_connection_is_resumed(download, tmp_path):
    """Within a run, and by the next run: the bytes that are there are not asked for again."""
    large = WEIGHTS * 24  # the client writes 10 MiB at a time: 12 arrive before the cut, 10 of them count
    repo = Repo(BASE | {"model.safetensors": large}, faults={"model.safetensors": Fault("short", times=1)})
    with HubServer({"org/model": repo}) as hub:
        download(hub.url, "--repo_id", "org/model").ok()
        bodies = [r for r in hub.requests if r.method == "GET" and r.path.startswith("/cdn/")]
        ranges = [r.range for r in bodies if r.path.endswith(".safetensors")]
        assert ranges == [None, f"bytes={10 << 20}-"]
        assert (folder(tmp_path) / "model.safetensors").read_bytes() == large

        (folder(tmp_path) / "model.safetensors").unlink()
        digest = hashlib.sha256(large).hexdigest()
        partial = folder(tmp_path) / f".model.safetensors.{digest[:12]}.part"
        partial.write_bytes(large[:1000])  # what a killed run leaves
        hub.requests.clear()
        download(hub.url, "--repo_id", "org/model").ok()
        assert {r.range for r in hub.requests if r.method == "GET" and "model.safe" in r.path} == {"bytes=1000-"}
        assert (folder(tmp_path) / "model.safetensors").read_bytes() == large
        assert not partial.exists()


def test_a_failed_run_leaves_its_part_to_the_next(download, tmp_path):
    repo = Repo(BASE | {"model.safetensors": WEIGHTS}, faults={"model.safetensors": Fault("500")})
    with HubServer({"org/model": repo}) as hub:
        error = download(hub.url, "--repo_id", "org/model").error()
        assert "model.safetensors: " in error and "500" in error and "run again" in error
        assert names(folder(tmp_path)) == {*BASE}
        repo.faults.clear()
        assert "1 of 3 files" in download(hub.url, "--repo_id", "org/model").ok()


def test_a_flipped_bit_is_found(download, tmp_path):
    """In a file with a sha256 (LFS) and in one with git's hash; and the file does not stay."""
    files = BASE | {"model.safetensors": WEIGHTS}
    for name in ("model.safetensors", "config.json"):
        with HubServer({"org/model": Repo(files, faults={name: Fault("flipped", times=1)})}) as hub:
            error = download(hub.url, "--repo_id", "org/model", "--checkpoint_dir", f"for_{name}").error()
            assert f"{name} came damaged" in error
            assert name not in names(tmp_path / f"for_{name}")
            download(hub.url, "--repo_id", "org/model", "--checkpoint_dir", f"for_{name}").ok()
            assert (tmp_path / f"for_{name}" / name).read_bytes() == files[name]


def test_without_a_network(download, tmp_path):
    """A complete directory is enough, whoever filled it; an incomplete one names what it lacks."""
    with HubServer({"org/model": Repo(BASE | {"model.safetensors": WEIGHTS})}) as hub:
        download(hub.url, "--repo_id", "org/model").ok()
        dead = hub.url  # nobody listens there any more, below
    for more in ({}, {"HF_HUB_OFFLINE": "1"}):
        said = download(dead, "--repo_id", "org/model", **more).ok()
        assert "is complete" in said and "--checkpoint_dir checkpoints/org/model" in said
    assert "revision v2" in download(dead, "--repo_id", "org/model", "--revision", "v2").error()
    (folder(tmp_path) / "model.safetensors").write_bytes(b"cut")
    assert "lacks model.safetensors" in download(dead, "--repo_id", "org/model").error()

    other = folder(tmp_path, "org/other")  # filled by another program: no record of ours
    other.mkdir()
    index = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    (other / "model.safetensors.index.json").write_text(json.dumps(index))
    (other / "model-1-of-2.safetensors").write_bytes(b"1")
    error = download(dead, "--repo_id", "org/other").error()
    assert "lacks config.json, model-2-of-2.safetensors, tokenizer.json or" in error
    for name in ("config.json", "tokenizer.json", "model-2-of-2.safetensors"):
        (other / name).write_bytes(b"{}")
    download(dead, "--repo_id", "org/other").ok()
    error = download(dead, "--repo_id", "org/absent").error()
    assert "cannot be read" in error and "check the network" in error
    assert not folder(tmp_path, "org/absent").exists()


def test_a_gated_repository(download, tmp_path):
    """What to do differs with the token: none, one without access, one the Hub does not know; the right one works."""
    with HubServer({"org/model": Repo(BASE | {"model.safetensors": WEIGHTS}, token=TOKEN)}) as hub:
        page = f"{hub.url}/org/model"
        error = download(hub.url, "--repo_id", "org/model").error()
        assert f"gated: accept its licence at {page}" in error and "HF_TOKEN or --access_token" in error
        error = download(hub.url, "--repo_id", "org/model", "--access_token", "hf_stranger").error()
        assert page in error and "no access yet" in error and "hf_stranger" not in error
        error = download(hub.url, "--repo_id", "org/model", token="expired").error()
        assert "does not know the token" in error and "expired; give" in error
        error = download(hub.url, "--repo_id", "org/model", "--access_token", f"{TOKEN}\u2026").error()
        assert "contains a character" in error
        assert not folder(tmp_path).exists()
        hub.requests.clear()
        download(hub.url, "--repo_id", "org/model", token=TOKEN).ok()
        assert all(r.authorized for r in hub.requests if r.path.startswith(("/api/models", "/org/model/resolve")))
        assert not any(r.authorized for r in hub.requests if r.path.startswith("/cdn/")), "the token went elsewhere"
        written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
        assert TOKEN.encode() not in written
        download(hub.url, "--repo_id", "org/model", "--access_token", TOKEN, "--checkpoint_dir", "again").ok()


def test_what_does_not_exist(download, tmp_path):
    with HubServer({"org/model": Repo(BASE | {"model.safetensors": b"x"})}) as hub:
        error = download(hub.url, "--repo_id", "org/nothing").error()
        assert "has no repository org/nothing" in error and "HF_TOKEN" in error
        error = download(hub.url, "--repo_id", "org/nothing", token=TOKEN).error()
        assert "has no repository org/nothing" in error and "the token's account" in error
        error = download(hub.url, "--repo_id", "org/model", "--revision", "v9").error()
        assert "org/model has no revision 'v9'" in error and f"{hub.url}/org/model/tree/main" in error
        assert not (tmp_path / "checkpoints").exists()


def test_a_revision_replaces_another_whole(download, tmp_path):
    """Files of the same size, and files the new revision does not have, do not stay from the old one."""
    shards = {
        "model.safetensors.index.json": b'{"weight_map": {"a": "model-1-of-1.safetensors"}}',
        "model-1-of-1.safetensors": b"old",
    }
    repo = Repo(
        BASE | shards, branches={"v2": BASE | {"model.safetensors": b"new"}, "v3": BASE | {"model.safetensors": b"3rd"}}
    )
    with HubServer({"org/model": repo}) as hub:
        download(hub.url, "--repo_id", "org/model").ok()
        (folder(tmp_path) / "lit_model.safetensors").write_bytes(b"ours")
        hub.requests.clear()
        manifest = tmp_path / "checkpoints" / "org" / "model" / "manifest.json"
        manifest.write_text("converted from main")
        download(hub.url, "--repo_id", "org/model").ok()
        assert manifest.exists()
        download(hub.url, "--repo_id", "org/model", "--revision", "v2").ok()
        assert not manifest.exists(), "weights of one revision must not pass for those of another"
        assert hub.fetched() == ["model.safetensors"]
        assert names(folder(tmp_path)) == {*BASE, "model.safetensors", "lit_model.safetensors"}
        commit = repo.commit("v3")
        download(hub.url, "--repo_id", "org/model", "--revision", commit).ok()
        assert (folder(tmp_path) / "model.safetensors").read_bytes() == b"3rd"
        assert json.loads((folder(tmp_path) / "download.json").read_text())["commit"] == commit


def test_a_hub_in_trouble(download, tmp_path):
    """The cause is said, not that something is not found locally; what is complete is not held up by it."""
    repo = Repo(BASE | {"model.safetensors": WEIGHTS})
    with HubServer({"org/model": repo}) as hub:
        for fault, cause in (
            (Fault("500"), "answers 500"),
            (Fault("429", retry_after=7), "answers 429"),
            (Fault("hang"), "timed out"),
        ):
            repo.faults = {"api": fault}
            error = download(hub.url, "--repo_id", "org/model").error()
            assert cause in error and "run again" in error and "locally" not in error
            assert ("wait 7 s" in error) == (cause == "answers 429")
        assert not (tmp_path / "checkpoints").exists()
        repo.faults = {}
        download(hub.url, "--repo_id", "org/model").ok()
        repo.faults = {"api": Fault("503")}
        said = download(hub.url, "--repo_id", "org/model").ok()
        assert "answers 503" in said and "is complete" in said


def test_a_body_longer_than_stated(download, tmp_path):
    """Chunks without end, and a compressed body: neither fills the disk, nor the screen with the client's words."""
    repo = Repo(BASE | {"model.safetensors": WEIGHTS})
    with HubServer({"org/model": repo}) as hub:
        for kind, says in (("endless", "gives more than 1,048,576 bytes"), ("gzip", "a compressed body (gzip)")):
            repo.faults = {"model.safetensors": Fault(kind)}
            outcome = download(hub.url, "--repo_id", "org/model")
            assert says in outcome.error() and "what came is kept" not in outcome.stderr
            assert names(folder(tmp_path)) == {*BASE}
            assert sum(path.stat().st_size for path in folder(tmp_path).iterdir()) < 10_000
            assert "resume" not in outcome.stderr
        repo.faults = {}
        download(hub.url, "--repo_id", "org/model").ok()


def test_a_model_without_a_record_is_somebodys_own(download, tmp_path):
    """What was edited, and converted, by hand is not replaced; what is the Hub's, whoever fetched it, is taken over."""
    with HubServer({"org/model": Repo(BASE | {"model.safetensors": WEIGHTS})}) as hub:
        download(hub.url, "--repo_id", "org/model").ok()
        directory = folder(tmp_path)
        (directory / "manifest.json").write_text("converted")
        for record in ("{}", '{"files": []}', '{"files": {"../x": {}}}', "[" * 99_999):
            (directory / "download.json").write_text(record)
            assert "0 of 3 files" in download(hub.url, "--repo_id", "org/model").ok()
            assert (directory / "manifest.json").exists()
            (directory / "download.json").write_text(record)
            (directory / "config.json").write_text("mine")
            before = {path: path.read_bytes() for path in directory.iterdir()}
            error = download(hub.url, "--repo_id", "org/model").error()
            assert "holds config.json of its own" in error and "another --checkpoint_dir" in error
            assert before == {path: path.read_bytes() for path in directory.iterdir()}
            (directory / "config.json").write_bytes(BASE["config.json"])


FILE = {"rfilename": "vocab.json", "size": 3, "blobId": "a" * 40}
OTHERS = [{"rfilename": name, "size": 3, "blobId": "a" * 40} for name in (*BASE, "model.safetensors")]
WHOLE = {"id": "org/model", "sha": "b" * 40, "siblings": [*OTHERS, FILE]}


@pytest.mark.parametrize(
    "description",
    [
        *([], None, "x", 5, {}, {"id": 5}),
        *(WHOLE | {"siblings": wrong} for wrong in ("x", [1], [{}], [[]], 5)),
        *(WHOLE | {"siblings": [*OTHERS, FILE | {"rfilename": wrong}]} for wrong in (None, 5, ["x"])),
        *(WHOLE | {"siblings": [*OTHERS, FILE | {"lfs": wrong}]} for wrong in ("x", [1], {"size": 3})),
        *(WHOLE | {"siblings": [*OTHERS, FILE | {"size": wrong}]} for wrong in (-5, 10**400, "9")),
        *(WHOLE | {"siblings": [*OTHERS, FILE | {"blobId": wrong}]} for wrong in (5, int("1" * 40))),
        *(WHOLE | {"sha": wrong} for wrong in (5, None, "../../x", int("1" * 40))),
        *(WHOLE | {name: 5} for name in ("safetensors", "transformersInfo", "evalResults", "lastModified")),
        b"[" * 99_999,
        b"\xff",
    ],
    ids=lambda description: str(description)[-60:],
)  # fmt: skip
def test_a_hub_that_describes_no_repository(description, tmp_path, monkeypatch):
    from huggingface_hub import constants

    from lit_sft.args import DownloadArgs
    from lit_sft.hub import download

    body = description if isinstance(description, bytes) else json.dumps(description).encode()
    with HubServer({"org/model": Repo({}, description=body)}) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        with pytest.raises(InputError, match=re.escape(hub.url)):
            download(DownloadArgs(repo_id="org/model", checkpoint_dir=str(tmp_path / "new")))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("HF_ENDPOINT", "http://[::1", "a variable HF_… of the environment cannot be used: Invalid IPv6 URL"),
        ("HF_ENDPOINT", "http://h:99999", "99999|out of range"),
        ("HF_HUB_ETAG_TIMEOUT", "abc", "'abc'; correct it"),
        ("HF_ENDPOINT", f"http://user:{TOKEN[3:]}@127.0.0.1:9", r"http://\*\*\*@127.0.0.1:9 cannot be read"),
    ],
)
def test_an_environment_that_is_wrong(name, value, says, download, tmp_path):
    error = download("http://127.0.0.1:9", "--repo_id", "org/model", **{name: value}).error()
    assert re.search(says, error) and TOKEN[3:] not in error
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.slow
def test_a_body_that_never_comes(download, tmp_path):
    """The client's own retries end; what came is where the next run starts."""
    large = WEIGHTS * 24
    repo = Repo(BASE | {"model.safetensors": large}, faults={"model.safetensors": Fault("short")})
    with HubServer({"org/model": repo}) as hub:
        assert "what came is kept" in download(hub.url, "--repo_id", "org/model").error()
        repo.faults = {"model.safetensors": Fault("hang")}
        assert "timed out" in download(hub.url, "--repo_id", "org/model").error()
        repo.faults = {"model.safetensors": Fault("429", times=1, retry_after=0)}
        hub.requests.clear()
        download(hub.url, "--repo_id", "org/model").ok()
        assert {r.range for r in hub.requests if r.method == "GET" and "model.safe" in r.path} == {f"bytes={10 << 20}-"}
        assert (folder(tmp_path) / "model.safetensors").read_bytes() == large


def test_the_known_models(download):
    said = download("http://127.0.0.1:9").ok()
    assert all(name in said for repositories in REPOSITORIES.values() for name in repositories)
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+", name) for names in REPOSITORIES.values() for name in names)


def test_fetch_url(tmp_path, monkeypatch):
    from lit_sft.transfer import fetch_url

    with HubServer({"org/data": Repo({"data.json": b"[1]", "late.json": bytes(22 << 20)})}) as hub:
        path = tmp_path / "new" / "data.json"
        assert fetch_url(f"{hub.url}/org/data/resolve/main/data.json", path) == path
        assert path.read_bytes() == b"[1]"
        hub.repos["models"]["org/data"].faults = {"late.json": Fault("500")}
        for url in (
            f"{hub.url}/nowhere",
            f"{hub.url}/org/data/resolve/main/late.json",
            "file:///etc/passwd",
            "http://[",
            "http://127.0.0.1:99999/data.json",
            "data.json",
        ):
            with pytest.raises(InputError, match=re.escape(url)):
                fetch_url(url, path)
        monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=60 << 20))
        for kind, says in (
            ("endless", "more than 31,457,280 bytes"),
            ("gzip", "compressed"),
            ("again", "anew"),
        ):
            hub.repos["models"]["org/data"].faults = {"late.json": Fault(kind)}
            with pytest.raises(InputError, match=says):
                fetch_url(f"{hub.url}/org/data/resolve/main/late.json", path)
        assert path.read_bytes() == b"[1]" and [p.name for p in path.parent.iterdir()] == ["data.json"]


@pytest.mark.slow
def test_datasets_reads_from_the_server(tmp_path):
    """A repository of jsonl files loads by name; one that carries a script (LIMA's) only by its files' addresses."""
    rows = {"train.jsonl": b'{"conversations": ["q", "a"]}\n', "test.jsonl": b'{"conversations": ["q"]}\n'}
    repos = {"GAIR/lima": Repo(rows | {"lima.py": b""}, token=TOKEN), "org/plain": Repo(rows)}
    code = """if True:
        from datasets import load_dataset
        plain = load_dataset("org/plain")
        files = {split: f"hf://datasets/GAIR/lima/{split}.jsonl" for split in ("train", "test")}
        lima = load_dataset("json", data_files=files)
        assert {s: plain[s][:] for s in plain} == {s: lima[s][:] for s in lima}, (plain, lima)
        try:
            load_dataset("GAIR/lima")
        except RuntimeError as error:
            print(error)
    """
    with HubServer({}, repos) as hub:
        env = environment(hub.url, tmp_path, TOKEN, HF_HUB_DOWNLOAD_TIMEOUT="10", HF_HUB_ETAG_TIMEOUT="10")
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=90)
    assert "scripts are no longer supported" in done.stdout, done.stderr
