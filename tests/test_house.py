"""The house keeps its shape: the package list is the tree, and imports go down only."""

import ast
import pathlib
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
NOT_PACKAGED = {"tests", "bench", "notebooks", "docs"}
FLOORS = {
    "errors": -1,
    "sharding": 0,
    "layers": 1,
    "data": 1,
    "model": 2,
    "configs": 3,
    "infer": 3,
    "evals": 4,
    "train": 5,
}
CODE_ROOTS = [d for d in FLOORS if (ROOT / d).is_dir()]


def _modules():
    for folder in CODE_ROOTS:
        yield from sorted((ROOT / folder).rglob("*.py"))
    yield ROOT / "errors.py"


def _imports(path):
    """Root-relative dotted names of everything of ours that a module imports."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - (node.level - 1)]
            assert len(package) >= node.level - 1, f"{path}:{node.lineno} leaves the package"
            prefix = ".".join(base)
            module = ".".join(filter(None, [prefix, node.module]))
            yield from (f"{module}.{alias.name}".strip(".") for alias in node.names)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                assert name.split(".")[0] != "jaxalope", f"{path}:{node.lineno}: import relatively"


def test_package_list_equals_the_tree():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    tracked = {"jaxalope"}
    for init in ROOT.rglob("__init__.py"):
        parts = init.relative_to(ROOT).parts[:-1]
        if parts and parts[0] in FLOORS:
            tracked.add(".".join(("jaxalope", *parts)))
    folders_with_code = {
        ".".join(("jaxalope", *path.relative_to(ROOT).parts[:-1])) for path in _modules()
    }
    assert set(listed) == tracked
    assert folders_with_code <= tracked, "a folder with code has no __init__.py"


def test_every_root_folder_is_known():
    visible = {p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(".")}
    code = {name for name in visible if any((ROOT / name).rglob("*.py"))}
    assert code - NOT_PACKAGED - {"build", "runs"} <= set(FLOORS)


@pytest.mark.parametrize("path", list(_modules()), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for name in _imports(path):
        target = name.split(".")[0]
        if target in FLOORS and target != own:
            assert FLOORS[target] < FLOORS[own], f"{path.relative_to(ROOT)} imports {name}"
        # The public face imports everything; only command lines may import it back.
        if target not in FLOORS:
            assert path.name == "__main__.py", f"{path.relative_to(ROOT)} imports the root: {name}"


def test_no_circle_between_modules():
    graph = {}
    for path in _modules():
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        graph[name] = set(_imports(path))
    edges = {}
    for name, targets in graph.items():
        found = set()
        for target in targets:
            while target and target not in graph:
                target = target.rpartition(".")[0]
            # A module may import its own package's siblings while the package is still loading.
            if target and target != name and not name.startswith(target + "."):
                found.add(target)
        edges[name] = found
    done, active = set(), []

    def visit(name):
        if name in done:
            return
        assert name not in active, " -> ".join([*active[active.index(name) :], name])
        active.append(name)
        for target in sorted(edges[name]):
            visit(target)
        active.pop()
        done.add(name)

    for name in edges:
        visit(name)


def test_the_public_face_imports_quickly_and_lazily():
    """``import jaxalope`` must not import JAX: command lines answer ``--help`` at once."""
    import subprocess
    import sys

    code = "import sys, jaxalope; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
