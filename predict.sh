#!/bin/sh
# Segments every volume of inputs/ beside this file into outputs/; options go to the service:
# sh predict.sh --help
cd "$(dirname "$0")" || exit 2
exec "${PYTHON:-python3}" -m inference "$@"
