#!/usr/bin/env bash
# Replaces the containers of services of compose.yaml one by one: beside each old one a new one is started, of the image and settings that
# there are now, and only when it is healthy the old one is asked to drain. So a new version goes in, or a process is begun anew, and
# whoever asks always finds one that is ready.
#
#   scripts/compose-roll.sh SERVICE…     relay, orders, payments, of which the relay goes first; before it `docker compose build` for a new version
#
# Not for the gateway, whose port only one can have, nor for what keeps data: `docker compose restart` them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

healthy_s=120 # for a new one
drain_s=15    # for an old one; more than shutdown.timeout_ms

say() { echo "compose-roll: $*" >&2; }
die() { say "FAILED: $*"; exit 1; }

take_back() { # SERVICE BEFORE… : what was begun beside them would be in the service's name, and be an old one the next time
  local id
  for id in $(docker compose ps -a -q "$1"); do
    case " ${*:2} " in
      *" $id "*) ;;
      *) docker logs --tail 20 "$id" >&2 || true; docker rm -f "$id" >/dev/null || true ;;
    esac
  done
}

[ $# -gt 0 ] || { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 2; }
for service in "$@"; do
  case $service in orders | payments | relay) ;; *) die "$service cannot have two containers side by side" ;; esac
done

# The relay first, whatever was said: it reads what the services of either version write (docs/OPERATIONS.md, "Upgrades"). That is by name,
# from the last to the first.
mapfile -t services < <(printf '%s\n' "$@" | sort -u -r)
for service in "${services[@]}"; do
  mapfile -t old < <(docker compose ps -q "$service")
  [ ${#old[@]} -gt 0 ] || die "$service is not up"
  for id in "${old[@]}"; do
    mapfile -t before < <(docker compose ps -q "$service")
    docker compose up -d --no-deps --no-build --no-recreate --wait --wait-timeout "$healthy_s" --scale "$service=$((${#old[@]} + 1))" "$service" \
      || { take_back "$service" "${before[@]}"; die "$service: the new container is not healthy within $healthy_s s; the old ones go on"; }
    docker stop --time "$drain_s" "$id" >/dev/null
    docker rm "$id" >/dev/null
    say "$service: one of ${#old[@]} replaced"
  done
done
