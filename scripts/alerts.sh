#!/usr/bin/env bash
# Checks the alerts as Prometheus reads them, and that each is raised by its incident and none by a shop that is well
# (deploy/prometheus/alerts.test.yml), and the settings of Prometheus in compose.yaml. Wants promtool; on Debian or Ubuntu it is taken from the package without installing that.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { echo "alerts: $*" >&2; }
tools=${CARGO_TARGET_DIR:-$PWD/target}/tools

promtool=$(command -v promtool || true)
if [ -z "$promtool" ]; then
  promtool=$tools/usr/bin/promtool
  if [ ! -x "$promtool" ]; then
    command -v apt-get >/dev/null && command -v dpkg >/dev/null || { say 'promtool is missing; it comes with Prometheus (https://prometheus.io/download/)'; exit 1; }
    say "fetching promtool from Debian's package of Prometheus"
    fetched=$(mktemp -d)
    trap 'rm -rf "$fetched"' EXIT
    chmod 755 "$fetched"
    cd "$fetched"
    if ! apt-get -qq download prometheus 2>/dev/null; then
      apt-get -qq -o DPkg::Lock::Timeout=300 update
      apt-get -qq download prometheus
    fi
    cd - >/dev/null
    mkdir -p "$tools"
    # That one program: the package has 100 MB more.
    dpkg --fsys-tarfile "$fetched"/prometheus_*.deb | tar -x -C "$tools" ./usr/bin/promtool
  fi
fi

# Beside the alerts, as compose.yaml mounts it.
mounted=$(mktemp -d)
trap 'rm -rf ${fetched+"$fetched"} "$mounted"' EXIT
cp deploy/compose/prometheus.yml deploy/prometheus/alerts.yml "$mounted/"
"$promtool" check config "$mounted/prometheus.yml" >&2

cd deploy/prometheus
"$promtool" check rules alerts.yml >&2
"$promtool" test rules alerts.test.yml >&2
