#!/usr/bin/env bash
# Builds the image, starts all of compose.yaml, asks it (compose-check.sh), takes it away with its data. Under a project name of its own
# and at a free port, so that a shop which runs on this machine already, and what it keeps, is not touched.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

die() { echo "compose-test: $*" >&2; exit 1; }

command -v curl >/dev/null || die 'curl is missing'
command -v docker >/dev/null || die 'Docker is missing: this needs a Docker engine with its compose plugin (https://docs.docker.com/engine/install/); make test does without'
docker compose version >/dev/null 2>&1 || die 'docker has no compose plugin (Debian: docker-compose or docker-compose-plugin; v2 is needed)'
docker buildx version >/dev/null 2>&1 || die 'docker has no buildx plugin, which the Containerfile needs (Debian: docker-buildx or docker-buildx-plugin)'
docker version >/dev/null 2>&1 || die "no Docker engine answers: $(docker version 2>&1 | tail -n 1)"

export COMPOSE_PROJECT_NAME=shopd-test SHOPD_PORT=0 # the engine picks one

finish() {
  local rc=$?
  trap - EXIT
  if [ "$rc" != 0 ]; then
    docker compose logs --no-color --tail 20 >&2 || true
    docker compose ps -a >&2 || true
  fi
  docker compose down --volumes --remove-orphans || rc=${rc/#0/1}
  exit "$rc"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

docker compose up -d --build --wait --wait-timeout 300
address=$(docker compose port gateway 8000)
scripts/compose-check.sh "http://localhost:${address##*:}"
