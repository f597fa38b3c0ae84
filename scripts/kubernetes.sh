#!/usr/bin/env bash
# Holds deploy/kubernetes against the schemas of the Kubernetes API (kubernetes.py). Wants Python 3 with venv; the schemas come from PyPI into
# target/tools.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

version=1.34.1 # of kubernetes-validate, which holds the schemas

say() { echo "kubernetes: $*" >&2; }
die() { say "$*"; exit 1; }

command -v python3 >/dev/null || die 'python3 is missing'
venv=${CARGO_TARGET_DIR:-$PWD/target}/tools/kubernetes
if [ "$("$venv/bin/pip" show kubernetes-validate 2>/dev/null | sed -n 's/^Version: //p')" != "$version" ]; then
  say "installing kubernetes-validate $version into $venv"
  python3 -m venv "$venv" || die 'python3 has no venv (Debian: python3-venv)'
  "$venv/bin/pip" install -q "kubernetes-validate==$version" || die 'kubernetes-validate could not be installed (it comes from PyPI)'
fi
"$venv/bin/python" scripts/kubernetes.py deploy/kubernetes
