"""Finds and loads config files: by path, or by the name of one that comes with the package.

`tabletop`, `finetune/lora:int8` and `configs/tabletop.py` all work, also outside a checkout. An installed package keeps
its configs in `openvla_jax/_configs`, so that site-packages holds no package `configs`.
"""

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from openvla_jax.config import nearest
from openvla_jax.errors import InputError

_PACKAGE = "configs"  # the name under which config files import each other


def find(name: str) -> str:
    """Returns `name` (FILE, FILE:ARG, NAME or NAME:ARG) with the path of an existing file before the colon.

    Raises InputError if there is neither such a file nor a config of that name.
    """
    path, colon, argument = name.partition(":")
    if Path(path).is_file():
        return name
    shipped = Path(path).with_suffix("").as_posix().removeprefix(f"{_PACKAGE}/")
    if not (file := folder() / f"{shipped}.py").is_file():
        raise InputError(f"config file {path} does not exist; {nearest(shipped, names())}")
    return f"{file}{colon}{argument}"


def folder() -> Path:
    """The folder of the package's configs: in the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "_configs"
    return installed if installed.is_dir() else package.parent / _PACKAGE


def names() -> list[str]:
    """The names of the package's configs and sweeps, such as `tabletop` and `finetune/lora`."""
    files = (path.relative_to(folder()) for path in folder().rglob("*.py"))
    return sorted(path.with_suffix("").as_posix() for path in files if path.stem not in ("__init__", "common"))


@contextlib.contextmanager
def importable(path: str | Path) -> Iterator[None]:
    """Lets the config file at `path` import others as `configs.NAME`.

    A folder `configs` that `path` lies in comes first, then the package's. Modules that were imported as `configs`
    before are put back in the end.
    """
    own = [parent for parent in Path(path).resolve().parents if parent.name == _PACKAGE]
    package = ModuleType(_PACKAGE)
    package.__path__ = list(dict.fromkeys(map(str, [*own[:1], folder()])))
    before = _imported()
    try:
        _forget()
        sys.modules[_PACKAGE] = package
        yield
    finally:
        _forget()
        sys.modules.update(before)


def _imported() -> dict[str, ModuleType]:
    return {name: module for name, module in sys.modules.items() if name.partition(".")[0] == _PACKAGE}


def _forget() -> None:
    for name in _imported():
        del sys.modules[name]


def call(path: str | Path, function: str, *arguments: str) -> Any:
    """Returns `function(*arguments)` of the Python file at `path`.

    Raises InputError if the file does not exist or has no such function.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"file {path} does not exist")
    spec = importlib.util.spec_from_file_location(f"openvla_jax_file_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with importable(file):
        spec.loader.exec_module(module)
        if not hasattr(module, function):
            raise InputError(f"{path} has no function {function}()")
        return getattr(module, function)(*arguments)
