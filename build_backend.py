"""The build backend of pyproject.toml: setuptools, and one requirement that depends on the place.

``pip install .`` builds in an environment of its own, from which the installed torch is hidden. A
fixed build requirement ``torch`` would put the newest torch there: gigabytes, and perhaps of
another kind than the torch that fcnseg then runs with. So ``setup.py`` builds with the torch of the
environment that fcnseg is installed into. Only where that has none, or one too old for fcnseg,
torch is asked for: the newest, which pip, unless told otherwise, then installs beside fcnseg too.
"""

import importlib.metadata
import importlib.util
import os
import re
import site
import sys

try:
    import setuptools
except ModuleNotFoundError:
    sys.exit(
        "fcnseg: a build without isolation needs the package setuptools, which is not installed: "
        "run pip install setuptools wheel, or leave out --no-build-isolation"
    )
from setuptools.build_meta import *  # noqa: F403

OLDEST_TORCH = "2.11"
OLDEST_SETUPTOOLS = (64, 0)
BUILDS_WHEELS_ALONE = (70, 1)  # since this release setuptools does not need the package wheel


def release(version: str) -> tuple[int, ...]:
    """The first two numbers of a version: (2, 13) of ``2.13.0+cpu``."""
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def _folders() -> list[str]:
    """The environment's folders of packages, as far as its Python looks into them.

    pip takes them off ``sys.path`` for a build in isolation; ``site`` still knows them.
    """
    folders = site.getsitepackages()
    alone = sys.prefix != sys.base_prefix  # a virtual environment, which may open itself, though
    if alone:
        with open(os.path.join(sys.prefix, "pyvenv.cfg")) as file:
            alone = not re.search(r"include-system-site-packages\s*=\s*true", file.read(), re.I)
    return folders if alone else [site.getusersitepackages(), *folders]


def torch_is_there() -> bool:
    """Whether the environment has a torch fit for the build."""
    for folder in _folders():
        if os.path.isdir(os.path.join(folder, "torch", "include")):
            for found in importlib.metadata.distributions(name="torch", path=[folder]):
                return release(found.version) >= release(OLDEST_TORCH)
    return False


def import_torch() -> None:
    """Import the torch to build with, or end with a sentence that tells what to do."""
    if importlib.util.find_spec("torch") is None and torch_is_there():
        sys.path += _folders()  # at the end: the build's own packages go before torch's neighbours
    try:
        import torch
    except ModuleNotFoundError as error:
        if torch_is_there():
            sys.exit(
                f"fcnseg: the torch that is installed cannot be imported ({error}): run "
                "pip install --force-reinstall torch"
            )
        sys.exit(
            f"fcnseg: the build needs torch {OLDEST_TORCH} or newer, and none is installed: "
            "install torch first, or leave out --no-build-isolation"
        )
    if release(torch.__version__) < release(OLDEST_TORCH):
        sys.exit(
            f"fcnseg: the build needs torch {OLDEST_TORCH} or newer, got {torch.__version__}: run "
            "pip install --upgrade torch, or leave out --no-build-isolation"
        )


def _missing_requirements() -> list[str]:
    return [] if torch_is_there() else [f"torch>={OLDEST_TORCH}"]


def get_requires_for_build_wheel(config_settings=None):
    return _missing_requirements()


def get_requires_for_build_editable(config_settings=None):
    return _missing_requirements()


def get_requires_for_build_sdist(config_settings=None):
    return []  # setup.py needs no torch to collect files


def _check_setuptools() -> None:
    found = release(setuptools.__version__)
    if found < OLDEST_SETUPTOOLS:
        sys.exit(
            f"fcnseg: the build needs setuptools 64 or newer, got {setuptools.__version__}: run "
            "pip install --upgrade setuptools, or leave out --no-build-isolation"
        )
    if found < BUILDS_WHEELS_ALONE and importlib.util.find_spec("wheel") is None:
        sys.exit(
            f"fcnseg: setuptools {setuptools.__version__} builds only beside the package wheel, "
            "which is not installed: run pip install wheel, or leave out --no-build-isolation"
        )


_check_setuptools()
