"""A small real data set on every machine that has Python: which library module does a docstring come from?"""

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

MODULES = ("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "xml")


def read_docstrings() -> list[tuple[str, str]]:
    """Returns the modules' docstrings, each with its module's name, in an order that depends on Python alone."""
    library = Path(sysconfig.get_paths()["stdlib"])
    return [(text, module) for module in MODULES for path in _sources(library / module) for text in _docstrings(path)]


def _sources(package: Path) -> list[Path]:
    return sorted(path for path in package.rglob("*.py") if "test" not in path.relative_to(package).parts)


def _docstrings(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text
