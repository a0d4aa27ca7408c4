#!/bin/sh
# Segments every volume of inputs/ beside this file into outputs/; options go to the service, and
# relative paths in them count from the caller's folder: sh predict.sh --help
root=$(dirname -- "$(readlink -f -- "$0")")
if [ -z "$PYTHON" ]; then
    PYTHON=python3
    [ -x "$root/.venv/bin/python" ] && PYTHON=$root/.venv/bin/python  # what `make setup` makes
fi
# -E: PYTHONPATH and PYTHONHOME of a module system, or of the host, are for another Python. -P: modules
# are looked for beside this file, whatever its path is called, not in the caller's folder. -u: lines
# appear at once. -X utf8: a name is the same in tables whatever the locale.
exec "$PYTHON" -E -P -u -X utf8 -c '
import runpy, sys
sys.path.insert(0, sys.argv.pop(1))
runpy.run_module("inference", run_name="__main__", alter_sys=True)' "$root" "$@"
