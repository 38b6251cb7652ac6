#!/bin/sh
# Install what a Bento needs into a new Python environment:
#
#     sh install.sh BENTO ENVIRONMENT
#
# The versions are those with which the Bento was tested. pip takes wheels alone, so that no compiler
# is needed, and is not left behind.
set -eu
python3 -m venv "$2"
"$2/bin/python" -m pip install --disable-pip-version-check --no-cache-dir --only-binary=:all: \
  --requirement "$1/env/python/requirements.txt"
"$2/bin/python" -m compileall -q "$1/src"
"$2/bin/python" -m pip uninstall --yes --quiet setuptools pip
