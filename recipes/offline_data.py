"""Real text on every machine that has Python: its library's docstrings and sources, and the language's manual."""

import ast
import sys
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

MODULES = ("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "xml")
"""The packages that a docstring is classified into."""

INSTRUCTION = "Write the docstring of this Python function."
SHORTEST_ANSWER = 40
LONGEST_SOURCE = 2000

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class Function(NamedTuple):
    """A function of the standard library: its source without the docstring, and the docstring."""

    source: str
    docstring: str


def read_docstrings() -> list[tuple[str, str]]:
    """Returns the modules' docstrings, each with its module's name, in an order that depends on Python alone."""
    return [(text, module) for module in MODULES for path in _sources(_LIBRARY / module) for text in _docstrings(path)]


@cache
def read_functions() -> tuple[Function, ...]:
    """Returns the library's documented functions, each once, without very long ones and very short docstrings.

    Parsing the library takes seconds, so it is done once.
    """
    functions = (function for path in _sources(_LIBRARY) for function in _functions(path))
    return tuple(dict.fromkeys(functions))


def read_conversations(python: str = sys.version) -> Iterator[dict[str, list[dict[str, str]]]]:
    """Yield a prompt that shows each of these functions, and its docstring as the completion, as chat messages.

    Args:
        python: The version, for caches that tell data apart by the arguments.
    """
    for function in read_functions():
        yield as_messages(f"{INSTRUCTION}\n\n{function.source}", function.docstring)


def as_messages(prompt: str, completion: str) -> dict[str, list[dict[str, str]]]:
    """Return what a user and the assistant say, as chat templates take it."""
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "completion": [{"role": "assistant", "content": completion}],
    }


def read_prose() -> list[str]:
    """Returns the topics of the language's manual and the library's docstrings, each once: about 2 MB of English."""
    manual = [topics[name] for name in sorted(topics)]
    return list(dict.fromkeys([*manual, *_all_docstrings()]))


_LIBRARY = Path(sysconfig.get_paths()["stdlib"])
_NOT_THE_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages"}


def _sources(package: Path) -> list[Path]:
    return sorted(p for p in package.rglob("*.py") if _NOT_THE_LIBRARY.isdisjoint(p.relative_to(package).parts))


@cache
def _all_docstrings() -> tuple[str, ...]:
    return tuple(text for path in _sources(_LIBRARY) for text in _docstrings(path))


def _docstrings(path: Path) -> Iterator[str]:
    for node in ast.walk(_parse(path)):
        if isinstance(node, Documented):
            text = ast.get_docstring(node)
            if text:
                yield text


def _functions(path: Path) -> Iterator[Function]:
    for node in ast.walk(_parse(path)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node)
        if docstring and len(docstring) >= SHORTEST_ANSWER and len(node.body) > 1:
            node.body = node.body[1:]
            source = ast.unparse(node)
            if len(source) <= LONGEST_SOURCE:
                yield Function(source, docstring)


def _parse(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_bytes())
    except SyntaxError:  # lib2to3 carries files that are wrong on purpose
        return ast.Module([], [])
