#!/bin/sh
# A real llama.cpp server with a tiny random model, for tests and for looking at real bytes:
#
#   engine.sh PORT [SLOTS]
#
# The first run fetches llama.cpp (as the wheel `xllamacpp`) into target/real-llama, or into the
# directory that REAL_LLAMA_DIR names; later runs reuse it. Python 3 with venv is all it needs.
set -eu

port=${1:?usage: engine.sh PORT [SLOTS]}
slots=${2:-2}
here=$(cd "$(dirname "$0")" && pwd)
root=${REAL_LLAMA_DIR:-$here/../../target/real-llama}
python=$root/venv/bin/python
model=$root/tiny.gguf

mkdir -p "$root"
if ! [ -x "$python" ]; then
    python3 -m venv "$root/venv"
fi
if ! "$python" -c 'import gguf, numpy, xllamacpp' 2>/dev/null; then
    "$python" -m pip install --quiet --disable-pip-version-check gguf numpy xllamacpp
fi
if ! [ -f "$model" ] || [ "$here/tiny_model.py" -nt "$model" ]; then
    "$python" "$here/tiny_model.py" "$model.new"
    mv "$model.new" "$model"
fi
exec "$python" "$here/serve.py" "$model" "$port" "$slots"
