"""ARCHITECTURE.md is the code: the order of rooms, the gates of libraries, line budgets, and nothing left out."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lit_sft"
TEXT = (ROOT / "ARCHITECTURE.md").read_text()
ROOMS = {name: int(lines) for name, lines in re.findall(r"^\| `([\w/]+)` \| (\d+) \|", TEXT, re.MULTILINE)}
GATES = {
    library: set(re.findall(r"`(\w+)`", row[2]))
    for row in re.finditer(r"^\| ((?:`\w+`(?:, )?)+) \| ((?:`\w+`(?:, )?)+) \|$", TEXT, re.MULTILINE)
    for library in re.findall(r"`(\w+)`", row[1])
}
MODULES = {str(p.relative_to(PACKAGE).with_suffix("")): p for p in PACKAGE.rglob("*.py")}
COMMANDS = [p for folder in ("scripts", "finetune") for p in (ROOT / folder).glob("*.py")]


def imports(path: Path) -> set[str]:
    """Every module a file imports, at the top or inside a function, in full."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def rooms_of(names: set[str]) -> set[str]:
    """The rooms among imported names; importing a name of a package is importing the package."""
    rooms = set()
    for name in names:
        if name == "lit_sft" or name.startswith("lit_sft."):
            parts = name.split(".")[1:]
            for candidate in ("/".join(parts), "/".join([*parts, "__init__"]), "__init__" if not parts else ""):
                if candidate in MODULES and (candidate != "__init__" or not parts):
                    rooms.add(candidate)
    return rooms


def test_the_table_was_read() -> None:
    assert len(ROOMS) > 30 and "model" in ROOMS
    assert GATES["sentencepiece"] == GATES["tokenizers"] == {"tokenizer"} and len(GATES) > 8


def test_every_module_is_in_the_table_and_every_room_exists() -> None:
    assert set(MODULES) == set(ROOMS)


@pytest.mark.parametrize("room", MODULES)
def test_a_module_imports_only_from_rooms_above_its_own(room: str) -> None:
    order = list(ROOMS)
    below = {other for other in rooms_of(imports(MODULES[room])) - {room} if order.index(other) > order.index(room)}
    assert not below, f"{room} imports {below}, which come after it"


def test_the_layering_test_can_fail() -> None:
    assert rooms_of({"lit_sft.model.GPT", "lit_sft.families.find_family", "lit_sft.model"}) == {"model"}
    assert rooms_of({"lit_sft.families"}) == {"families/__init__"} and rooms_of({"lit_sft"}) == {"__init__"}
    assert rooms_of({"lit_sft.checkpoint"}) == {"checkpoint"}


@pytest.mark.parametrize("room", MODULES)
def test_line_budget(room: str) -> None:
    assert len(MODULES[room].read_text().splitlines()) <= ROOMS[room]


@pytest.mark.parametrize("room", MODULES)
def test_libraries_stay_in_their_rooms(room: str) -> None:
    for name in {name.partition(".")[0] for name in imports(MODULES[room])}:
        assert room.rpartition("/")[2] in GATES.get(name, {room.rpartition("/")[2]}), f"{room} imports {name}"


@pytest.mark.parametrize("room", ["model", "attention", "rope", "lora", "loss", "packing"])
def test_the_core_knows_torch_alone(room: str) -> None:
    libraries = {name.partition(".")[0] for name in imports(MODULES[room])}
    assert libraries - sys.stdlib_module_names <= {"torch", "lit_sft"}


@pytest.mark.parametrize("path", COMMANDS, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_commands_import_lit_sft_only_and_are_short(path: Path) -> None:
    libraries = {name.partition(".")[0] for name in imports(path)}
    assert libraries - sys.stdlib_module_names <= {"lit_sft"}
    assert not {"lit_sft.scripts", "lit_sft.finetune"} & imports(path)
    assert len(path.read_text().splitlines()) <= (45 if path.parent.name == "scripts" else 120)


def strings_of_code(path: Path) -> list[str]:
    """The string constants of a file, docstrings left out."""
    tree = ast.parse(path.read_text())
    documentation = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    constants = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in documentation]
    return [n.value for n in constants if isinstance(n.value, str)]


# prompt styles; tokenizer classes with a BOS policy of their own; a question to ask; llama.cpp and its names
NAMED = {
    "styles",
    "prompts",
    "tokenizer",
    "tokenizer_rules",
    "args",
    "generate",
    "gguf_vocabulary",
    "gguf_traits",
    "export_gguf",
}


@pytest.mark.parametrize("room", [r for r in MODULES if not r.startswith("families/") and r not in NAMED])
def test_family_names_stay_in_families(room: str) -> None:
    names = re.compile(r"llama|mistral|falcon|qwen|gemma|pythia|neox|phi-?3", re.IGNORECASE)
    found = {s for s in strings_of_code(MODULES[room]) if names.search(s)}
    assert found <= {"llama3"}  # the name of a rope scaling, in every config.json


def public_definitions() -> list[tuple[str, ast.AST]]:
    found = []
    for room, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            kinds = ast.FunctionDef | ast.ClassDef
            if isinstance(node, kinds) and not node.name.startswith("_"):
                found.append((f"{room}.{node.name}", node))
    return found


def test_functions_fit_on_a_screen() -> None:
    too_long = {
        name: node.end_lineno - node.lineno + 1
        for name, node in public_definitions()
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > 80
    }
    assert not too_long
