"""Both doors of every command, from an ordinary and from an editable installation, in a directory of its own."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT

from lit_sft.cli import commands

pytestmark = pytest.mark.slow

PARTS = ("lit_sft", "scripts", "finetune", "demo", "pyproject.toml", "README.md", "LICENSE")


@dataclass
class Installation:
    """A copy of the repository installed into an environment of its own, used from ``elsewhere``."""

    kind: str
    copy: Path
    environment: Path
    elsewhere: Path

    def run(self, *command: str | Path) -> str:
        """Run a command from ``elsewhere``; gives its standard output. The environment's own programs come first."""
        kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
        variables = kept | {"PATH": f"{self.environment / 'bin'}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "1000"}
        found = shutil.which(command[0], path=variables["PATH"])
        assert found is not None and Path(found).is_relative_to(self.environment), found
        done = subprocess.run(command, cwd=self.elsewhere, env=variables, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout


@pytest.fixture(scope="module", params=["ordinary", "editable"])
def installation(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    base = tmp_path_factory.mktemp(request.param)
    made = Installation(request.param, base / "copy", base / "environment", base / "elsewhere")
    made.elsewhere.mkdir()
    made.copy.mkdir()
    for part in PARTS:
        source, target = ROOT / part, made.copy / part
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(source, target)
    # The packages that lit_sft needs are those of the running environment, by a path file: nothing is downloaded. What
    # such a file names is not searched for further path files, so an editable lit_sft there is not seen.
    venv.create(made.environment, with_pip=False)
    python = made.environment / "bin" / "python"
    own = Path(sysconfig.get_path("purelib", vars={"base": str(made.environment)}))
    paths = dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
    (own / "running.pth").write_text("\n".join(paths) + "\n")
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-build-isolation"]
    install += ["--no-index", "--quiet", "--disable-pip-version-check"]
    source = ["--editable", str(made.copy)] if made.kind == "editable" else [str(made.copy)]
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([*install, *source], env=variables, cwd=made.elsewhere, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return made


def test_what_is_installed_is_what_is_imported(installation: Installation):
    code = "import sys, lit_sft; print(lit_sft.__file__); print('torch' in sys.modules)"
    where, torch_loaded = installation.run("python", "-c", code).splitlines()
    home = installation.copy if installation.kind == "editable" else installation.environment
    assert Path(where).is_relative_to(home)
    assert torch_loaded == "False"


def test_every_module_is_installed(installation: Installation):
    """pyproject.toml names the packages one by one: a new folder must be named there too."""
    code = "import importlib.util, sys\nfor n in sys.argv[1:]: print(importlib.util.find_spec(n).origin)"
    below = {"lit_sft": "lit_sft", "scripts": "lit_sft.scripts", "finetune": "lit_sft.finetune"}
    files = {
        ".".join([package, *path.relative_to(installation.copy / folder).with_suffix("").parts]): path
        for folder, package in below.items()
        for path in (installation.copy / folder).rglob("*.py")
    }
    origins = installation.run("python", "-c", code, *files).splitlines()
    for path, origin in zip(files.values(), origins, strict=True):
        assert Path(origin).read_bytes() == path.read_bytes()


def test_lit_sft_lists_every_command(installation: Installation):
    from lit_sft import __version__

    text = installation.run("lit-sft")
    listed = text.partition("commands: ")[2].partition("\n")[0].split(", ")
    assert sorted(listed) == sorted(commands())
    assert installation.run("lit-sft", "--version") == f"lit_sft {__version__}\n"


def test_both_doors_of_every_command_open(installation: Installation):
    for name, module in commands().items():
        script = installation.copy / module.split(".")[1] / f"{name}.py"
        through_name = installation.run("lit-sft", name, "--help")
        through_path = installation.run("python", script, "--help")
        assert through_name.startswith(f"usage: lit-sft {name} ") and through_path.startswith(f"usage: {name}.py ")
        assert through_name.split()[3:] == through_path.split()[2:]  # the same flags; their wrapping follows the name
    assert not any(installation.elsewhere.iterdir())


def test_a_real_command_works_through_both_doors(installation: Installation, tmp_path: Path):
    made = tmp_path / "tiny"
    installation.run("python", installation.copy / "demo" / "make_checkpoint.py", "--checkpoint_dir", made)
    installation.run("lit-sft", "convert_hf_checkpoint", "--checkpoint_dir", made)
    assert {"lit_model.safetensors", "model_config.json", "manifest.json"} <= {path.name for path in made.iterdir()}
    data, sample = tmp_path / "data", installation.copy / "demo" / "instructions.csv"
    script = installation.copy / "scripts" / "prepare_csv.py"
    flags = ["--csv_path", sample, "--checkpoint_dir", made, "--destination_path", data]
    assert "train and" in installation.run("python", script, *flags)
    assert (data / "manifest.json").is_file()
    assert (data / "report.html").is_file()  # its templates are installed too
