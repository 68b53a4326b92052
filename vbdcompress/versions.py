"""Versions of what is installed."""

from importlib import metadata


def version_of(package: str) -> str:
    """As its metadata say; "not installed" where there are none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
