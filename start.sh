#!/bin/sh
# Sets up sagewan on the first call and opens it; arguments go to sagewan itself.
exec "${PYTHON:-python3}" "$(dirname "$0")/tools/start.py" "$@"
