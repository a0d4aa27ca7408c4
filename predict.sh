#!/bin/sh
# Segments every volume of inputs/ beside this file into outputs/; options go to the service, and
# relative paths in them count from the caller's folder: sh predict.sh --help
root=$(cd "$(dirname "$0")" && pwd) || exit 2
if [ -z "$PYTHON" ]; then
    PYTHON=python3
    [ -x "$root/.venv/bin/python" ] && PYTHON=$root/.venv/bin/python  # what `make setup` makes
fi
# -P: modules are looked for beside this file, not in the caller's folder.
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$PYTHON" -P -m inference "$@"
