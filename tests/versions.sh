#!/usr/bin/env bash
# The tests with the lowest versions that settings.ini claims, then with the newest, each in a fresh virtual environment
# in a temporary folder (set TMPDIR to a disk with 7 GB to spare). `tests/versions.sh lowest tests/test_cam.py` does one of the two.
# Needs Python >= 3.10 ($PYTHON), git and the package index.
set -euo pipefail
cd "$(dirname "$0")/.."
which=lowest\ newest
case "${1:-}" in lowest|newest) which=$1; shift;; esac
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
export FASTAI_HOME=$tmp/fastai MPLCONFIGDIR=$tmp/matplotlib
unset CIFAR_CAM_DATA PYTHONPATH
git clone -q "$PWD" "$tmp/src"
cd "$tmp/src"
${PYTHON:-python3} -m venv "$tmp/uv"
"$tmp/uv/bin/pip" install -q uv

for w in $which; do
  # lowest: of what the package itself asks for; all else, the tools of the tests too, is the newest that fits
  case $w in lowest) how='--resolution lowest --no-deps';; newest) how='--extra dev';; esac
  "$tmp/uv/bin/uv" venv -q --seed --python "${PYTHON:-python3}" "$tmp/$w"
  # shellcheck disable=SC2086
  "$tmp/uv/bin/uv" pip compile -q $how --python "$tmp/$w/bin/python" pyproject.toml -o "$tmp/$w.txt"
  printf '\n== %s\n' "$w"
  grep -E '^(fastai|torch|torchvision|albumentations|grad-cam|matplotlib|safetensors|jinja2|numpy|pandas)=' "$tmp/$w.txt"
  "$tmp/uv/bin/uv" pip install -q --python "$tmp/$w/bin/python" -c "$tmp/$w.txt" -e '.[dev]'
  PATH="$tmp/$w/bin:$PATH" "$tmp/$w/bin/python" -m pytest -q -p no:cacheprovider "$@"
  case "$*" in *"-m slow"*) PATH="$tmp/$w/bin:$PATH" OMP_NUM_THREADS=1 nbdev-test --flags slow;; esac  # cells that take long
  rm -rf "${tmp:?}/$w"
done
