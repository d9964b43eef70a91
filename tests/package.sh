#!/usr/bin/env bash
# Builds the sdist and, from it, the wheel; installs the wheel in an empty environment outside the
# repository and runs the self-test there. Needs PyPI for torch and numpy.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "${PYTHON:-python3}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

rm -rf dist
"$python" -m build --no-isolation --outdir dist .
cp dist/*.whl "$work"
cd "$work"

"$python" -m venv venv
venv/bin/python -m pip --disable-pip-version-check -q install \
    "$("$python" -c 'import torch; print("torch==" + torch.__version__.split("+")[0])')" numpy
venv/bin/python -m pip --disable-pip-version-check -q install --no-deps ./*.whl
venv/bin/python -c '
import fcnseg, sys
from fcnseg import models  # importable without the training extras
assert fcnseg.__file__.startswith(sys.prefix), fcnseg.__file__
assert fcnseg.build_info()["missing_reason"] is None
'
venv/bin/python -m fcnseg
echo "the wheel installs and runs in an empty environment"
