"""The extra `serve`: packages that only the server needs."""

import importlib

MODULES = ("starlette", "uvicorn", "python_multipart", "prometheus_client")


def missing() -> list[str]:
    """Return which of the extra's modules cannot be imported, be it for want of what they need themselves."""
    return [name for name in MODULES if not _imports(name)]


def _imports(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True
