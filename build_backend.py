"""The build backend of pyproject.toml: setuptools, and one requirement that depends on the place.

``pip install .`` builds in an environment of its own, from which the installed torch is hidden. A
fixed build requirement ``torch`` would put the newest torch there: gigabytes, and perhaps of
another kind than the torch that fcnseg then runs with. So ``setup.py`` builds with the torch of the
environment that fcnseg is installed into. Only where that has none, or one too old for fcnseg,
torch is asked for: the same release that pip then installs for fcnseg to run with.
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

OLDEST_TORCH = (2, 11)
OLDEST_SETUPTOOLS = (64, 0)
BUILDS_WHEELS_ALONE = (70, 1)  # since this release setuptools does not need the package wheel


def release(version: str) -> tuple[int, ...]:
    """The first two numbers of a version: (2, 13) of ``2.13.0+cpu``."""
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def torch_folder() -> str | None:
    """The environment's folder of packages that holds a torch fit for the build, or None.

    pip takes these folders off ``sys.path`` for a build in isolation; ``site`` still knows them.
    """
    for folder in [*site.getsitepackages(), site.getusersitepackages()]:
        if os.path.isdir(os.path.join(folder, "torch", "include")):
            for found in importlib.metadata.distributions(name="torch", path=[folder]):
                if release(found.version) >= OLDEST_TORCH:
                    return folder
    return None


def import_torch() -> None:
    """Import the torch to build with, or end with a sentence that tells what to do."""
    folder = torch_folder()
    if importlib.util.find_spec("torch") is None and folder is not None:
        sys.path.append(folder)  # at the end: the build's own packages go before torch's neighbours
    oldest = ".".join(map(str, OLDEST_TORCH))
    try:
        import torch
    except ModuleNotFoundError as error:
        sys.exit(
            f"fcnseg: the build needs torch {oldest} or newer, which cannot be imported ({error}): "
            "install torch first, or leave out --no-build-isolation"
        )
    if release(torch.__version__) < OLDEST_TORCH:
        sys.exit(
            f"fcnseg: the build needs torch {oldest} or newer, got {torch.__version__}: run "
            "pip install --upgrade torch, or leave out --no-build-isolation"
        )


def _missing_requirements() -> list[str]:
    return [] if torch_folder() else ["torch>=" + ".".join(map(str, OLDEST_TORCH))]


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
