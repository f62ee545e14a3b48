"""The house stands as DESIGN.md draws it: imports go down only, and each room keeps to its own trade.

Every module's source is parsed, so an import inside a function or under TYPE_CHECKING counts like any other.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest

import rekindle

PACKAGE = Path(rekindle.__file__).parent
FLOORS = {
    "errors": 0,
    "heap": 0,
    "openmp": 0,
    "tokens": 0,
    "settings": 1,
    "model": 1,
    "kv": 2,
    "engine": 2,
    "reuse": 3,
    "serve": 4,
    "api": 5,
    "lab": 5,
    "torch": 5,
    "page": 6,
    "cli": 6,
}
ROOF = 7  # rekindle itself: the public names, which may come from anywhere
THREADS = {"threading", "_thread", "asyncio", "concurrent", "multiprocessing"}
LOCKS = {"threading.Lock", "threading.RLock", "threading.Condition"}
OUTSIDE_WORLD = {"time", "datetime", "socket", "os", "io", "pathlib", "random", "http", "urllib", "subprocess"}
TRAINING = "rekindle.model.ember.train"  # a program of its own, which no other room imports
MODULES = sorted(PACKAGE.rglob("*.py"))


@lru_cache(maxsize=1)  # a module's questions come one after the other
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def name_of(path: Path) -> str:
    """`…/kv/keys.py` is rekindle.kv.keys, `…/kv/__init__.py` is rekindle.kv."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """The room, or the module of the ground floors, that a dotted name lies in; "" for rekindle itself."""
    return module.removeprefix("rekindle").removeprefix(".").partition(".")[0]


def floor_of(module: str) -> int:
    return FLOORS.get(room_of(module), ROOF)


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything that a module imports."""
    module = name_of(path)
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
                above = package[: len(package) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def takes_only_locks(path: Path, name: str) -> bool:
    """Whether a module imports `threading` for locks alone: to be used by threads is not to start one."""
    uses = [
        node.attr
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "threading"
    ]
    return name in LOCKS or (name == "threading" and bool(uses) and {f"threading.{use}" for use in uses} <= LOCKS)


def is_ours(name: str) -> bool:
    return name == "rekindle" or name.startswith("rekindle.")


def complaints(path: Path) -> list[str]:
    """What in a module's imports is against the plan."""
    module = name_of(path)
    room, floor = room_of(module), floor_of(module)
    found = []
    for line, name in imports_of(path):
        if is_ours(name):
            if room_of(name) == room or floor == ROOF:
                continue
            is_version = name in ("rekindle", "rekindle.__version__") and floor >= FLOORS["api"]
            if floor_of(name) >= floor and not is_version:
                found.append(f"{path}:{line}: {module} (floor {floor}) imports {name} (floor {floor_of(name)})")
        else:
            top = name.partition(".")[0]
            is_exempt = module == TRAINING or takes_only_locks(path, name)
            if floor < FLOORS["serve"] and top in THREADS and not is_exempt:
                found.append(f"{path}:{line}: {module} imports {name}, but threads live in serve/ only")
            if room == "reuse" and top in OUTSIDE_WORLD:
                found.append(f"{path}:{line}: {module} imports {name}, but reuse/ is pure decision")
    return found


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_down_only_and_every_module_says_what_it_is_for(path: Path) -> None:
    assert not (found := complaints(path)), "\n".join(found)
    docstring = ast.get_docstring(tree_of(path))
    assert docstring and len(docstring) > 20


@pytest.mark.parametrize("room", [room for room in FLOORS if (PACKAGE / room).is_dir()])
def test_every_room_says_what_lives_in_it(room: str) -> None:
    docstring = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text("utf-8")))
    assert docstring and docstring.startswith(f"Floor {FLOORS[room]}: ")


def test_every_room_has_its_floor() -> None:
    found = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert found - {"__init__", "__main__"} == set(FLOORS)


def test_a_wrong_import_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checker itself: upwards, sideways, relative, lazy and type-only imports, and threads below serve/."""
    package = tmp_path / "rekindle"
    (package / "kv").mkdir(parents=True)
    (package / "reuse").mkdir()
    monkeypatch.setitem(globals(), "PACKAGE", package)
    bad = {
        "from rekindle.engine.protocol import Payload": "kv/a.py",
        "import rekindle.serve.service": "kv/b.py",
        "from ..engine import llama": "kv/c.py",
        "def late():\n    from rekindle.api import app": "kv/d.py",
        "import threading": "kv/e.py",
        "from rekindle import LLM": "kv/f.py",
        "import time": "reuse/g.py",
        "import threading\n_lock = threading.Lock()\n_thread = threading.Thread()": "kv/h.py",
    }
    for source, place in bad.items():
        path = package / place
        path.write_text(source, "utf-8")
        assert len(complaints(path)) == 1, source
    fine = package / "kv" / "fine.py"
    fine.write_text(
        "import time\nfrom rekindle.errors import StoreError\nfrom . import keys\nfrom rekindle.kv import keys"
    )
    assert not complaints(fine)
