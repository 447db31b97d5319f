#!/usr/bin/env bash
# What a user of Colab meets: its versions (tests/colab-versions.txt) in a fresh virtual environment, the wheel installed by a notebook's
# first cell, the tour and the experiments in kernels of that environment, then the tests. `tests/colab.sh PYTHON [OPTIONS OF PYTEST]`
# With Python 3.13 it is Colab's; with another the same versions on that one. In a temporary folder (TMPDIR: 10 GB to spare). Needs git
# and the package index; no GPU, no data set.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
[ $# -eq 0 ] || shift
colab=$(sed -n 's/^# python //p' tests/colab-versions.txt)
here=$("$python" -c 'import platform; print(platform.python_version())')
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
export FASTAI_HOME=$tmp/fastai MPLCONFIGDIR=$tmp/matplotlib IPYTHONDIR=$tmp/ipython JUPYTER_CONFIG_DIR=$tmp/jupyter OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export PYDEVD_DISABLE_FILE_VALIDATION=1 # a warning of the kernel's debugger
unset CIFAR_CAM_DATA PYTHONPATH MPLBACKEND
step() { printf '\n== %s (%s s)\n' "$1" "$SECONDS"; }

if [ "${here%.*}" = "${colab%.*}" ]; then step "Colab's versions on Python $here (Colab: $colab)"
else step "Colab's versions, but on Python $here: Colab has $colab"; fi
git clone -q "$PWD" "$tmp/src"
cd "$tmp/src"
"$python" -m venv "$tmp/uv"
"$tmp/uv/bin/pip" install -q uv
uv() { "$tmp/uv/bin/uv" "$@"; }
uv build -q --wheel --python "$python" -o "$tmp/dist"
uv venv -q --python "$python" "$tmp/colab"
export PATH="$tmp/colab/bin:$PATH" VIRTUAL_ENV=$tmp/colab
uv pip install -q -r tests/colab-versions.txt
uv pip freeze > "$tmp/colab.txt"
grep -iE '^(pip|ipython|ipykernel|torch|torchvision|numpy|fastai|fastcore)=' "$tmp/colab.txt" | paste -sd ' '
mkdir "$tmp/content"
cp -r nbs "$tmp/content/nbs"
cd "$tmp/content"
notebooks=$tmp/src/tests/notebooks.py

step "the package alone, beside Colab's fastai: one line that says what to install"
uv pip install -q --no-deps "$tmp"/dist/*.whl
if python -c 'import cifar_cam' 2> "$tmp/said.log"; then echo "it was imported"; exit 1; fi
tail -1 "$tmp/said.log" | grep "pip install 'fastai>="
uv pip uninstall -q cifar_cam

step "the first cell in a session that imported fastai, with no cifar_cam on PyPI: from the repository; a restart is asked for"
# git takes the copy for the repository's address
GIT_CONFIG_COUNT=1 GIT_CONFIG_KEY_0="url.file://$tmp/src.insteadOf" GIT_CONFIG_VALUE_0=https://github.com/cifar-cam/cifar_cam \
    python "$notebooks" restart nbs/000_tour.ipynb
uv pip sync -q "$tmp/colab.txt"

step "the tour and the experiments, from the first cell on, in sessions of these versions"
echo "cifar_cam @ file://$(echo "$tmp"/dist/*.whl)" > "$tmp/wheel.txt" # which pip takes for what PyPI has
PIP_CONSTRAINT=$tmp/wheel.txt python "$notebooks" run nbs/000_tour.ipynb nbs/experiments/{davidnet,resnet18-*}.ipynb

step "the tests, with the package as the first cell left it"
cd "$tmp/src"
uv pip freeze > "$tmp/now.txt"
uv pip install -q -c "$tmp/now.txt" pytest pytest-xdist hypothesis
pytest -q -p no:cacheprovider "$@" # not `python -m pytest`, which would take the copy instead of the wheel
step "passed"
