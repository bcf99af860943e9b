"""Which versions are installed, where what is tested differs between them."""

from importlib.metadata import version

from packaging.version import Version


def is_before(package: str, bound: str) -> bool:
    """Whether the installed version of a package is older than a bound."""
    return Version(version(package)).release < Version(bound).release
