"""The layers of the package: a module imports only from its own layer or a lower one, and TensorFlow stays in data/."""

import ast

import pytest
from conftest import ROOT

PACKAGE = ROOT / "openvla_jax"
# Bottom to top. A name is a module or a package directly below openvla_jax.
LAYERS = (
    ("errors", "types", "config", "settings", "storage", "cli", "config_files", "parallel"),
    ("tokens", "vision", "kernels"),
    ("models",),
    ("checkpoint",),
    ("data",),
    ("sim",),
    ("training", "inference"),
    ("planning", "convert", "evaluation"),
    ("sweep",),
    ("train", "convert_weights", "serve", "evaluate", "__main__"),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# Side by side in one layer, but closed to each other.
FORBIDDEN = {("inference", "training"), ("training", "inference")}
FILES = sorted(PACKAGE.rglob("*.py"))
PUBLIC = PACKAGE / "__init__.py"  # lends public names from all layers, lazily


def room(module: str) -> str:
    """The part of the package that a dotted module name belongs to; "" for the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def imports(path) -> list[tuple[int, str]]:
    """(line, dotted module) of every import in a file, those inside functions included."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


@pytest.mark.parametrize(
    "path", [path for path in FILES if path != PUBLIC], ids=lambda path: path.relative_to(PACKAGE).as_posix()
)
def test_module_imports_only_from_its_layer_or_below(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert own in LEVEL, f"{own} has no layer: add it to LAYERS"
    upward = []
    for line, module in imports(path):
        if not module.startswith("openvla_jax."):
            continue
        other = room(module)
        if other and other in LEVEL and (LEVEL[other] > LEVEL[own] or (own, other) in FORBIDDEN):
            upward.append(f"{path.relative_to(ROOT)}:{line} imports {module}")
    assert not upward


def test_tensorflow_is_imported_in_data_only():
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in FILES
        for line, module in imports(path)
        if module.split(".")[0].startswith("tensorflow") and path.relative_to(PACKAGE).parts[0] != "data"
    ]
    assert not found


def module_name(path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_modules_have_no_import_cycle():
    """Imports inside functions count: hidden there, a cycle is still one."""
    names = {module_name(path): path for path in FILES}
    graph = {}
    for name, path in names.items():
        targets = set()
        for _, module in imports(path):
            hit = next((m for m in (module, module.rpartition(".")[0]) if m in names), None)
            if hit and hit != name and names[hit].name != "__init__.py":
                targets.add(hit)
        graph[name] = targets
    done, on_path = set(), []

    def visit(name):
        if name in on_path:
            pytest.fail(" -> ".join([*on_path[on_path.index(name) :], name]))
        if name not in done:
            on_path.append(name)
            for other in sorted(graph[name]):
                visit(other)
            done.add(on_path.pop())

    for name in graph:
        visit(name)


def test_layers_name_what_exists():
    present = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES} - {"__init__"}
    assert set(LEVEL) == present
