#!/usr/bin/env bash
# Everything that must hold before a change goes in. Ends with cargo's own output of the tests; arguments go to them
# (scripts/test.sh money: only the tests with `money` in their name).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

phase() { # NAME COMMAND…
  local name=$1 begun=$SECONDS
  shift
  echo "== $name" >&2
  "$@" || { echo "== $name: FAILED after $((SECONDS - begun)) s" >&2; exit 1; }
  echo "== $name: ok, $((SECONDS - begun)) s" >&2
}

phase 'what it needs' scripts/need.sh test
phase "Kafka's jars" scripts/kafka/kafka jars
phase 'the alerts' scripts/alerts.sh
phase 'the objects for Kubernetes' scripts/kubernetes.sh
phase 'what it is made of' scripts/supply.sh
phase 'what the release is told of itself' scripts/profile.sh check
phase 'formatting' cargo fmt --check
phase 'lints' cargo clippy --locked --all-targets --features faults -- -D warnings
phase 'lints of what is served: without fault points' cargo clippy --locked --lib --bins -- -D warnings
phase 'building the tests' cargo test --locked --features faults --no-run
if [ $# = 0 ]; then phase 'what the pure core costs, in instructions' scripts/gate.sh; fi
echo "== tests" >&2
exec cargo test --locked --features faults --no-fail-fast "$@"
