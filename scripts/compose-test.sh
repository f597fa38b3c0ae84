#!/usr/bin/env bash
# Shows on a real Docker engine what compose.yaml promises: builds the image, starts everything, and holds it to
#
#   a paid order (compose-check.sh) · the bounds of each container · networks that end where they should · secrets by file ·
#   replicas that share the work · restarts of every service under load (compose-load.py) without a lost request · the audit ·
#   down and up with the data kept
#
# Under a project name of its own and at a free port, so that a shop which runs on this machine already, and what it keeps, is not
# touched. Takes everything away again but the image, shopd:local, which is this checkout's then. Wants Docker with compose and buildx, curl, and Python 3.9. RATE=n: requests a second (200);
# ORDERS_RATE=n: orders a second while memory is measured (1000).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

rate=${RATE:-200} # requests a second
orders_rate=${ORDERS_RATE:-1000} # orders a second, while memory is measured
image_bytes_max=60000000

say() { echo "compose-test: $*" >&2; }
die() { say "FAILED: $*"; exit 1; }

command -v curl >/dev/null || die 'curl is missing'
command -v docker >/dev/null || die 'Docker is missing: this needs a Docker engine with its compose plugin (https://docs.docker.com/engine/install/); make test does without'
docker compose version >/dev/null 2>&1 || die 'docker has no compose plugin (Debian: docker-compose or docker-compose-plugin; v2 is needed)'
docker buildx version >/dev/null 2>&1 || die 'docker has no buildx plugin, which the Containerfile needs (Debian: docker-buildx or docker-buildx-plugin)'
docker version >/dev/null 2>&1 || die "no Docker engine answers: $(docker version 2>&1 | tail -n 1)"
python3 -c 'import sys; sys.exit(sys.version_info < (3, 9))' 2>/dev/null || die 'Python 3.9 or later is missing'

work=$(mktemp -d)
export COMPOSE_PROJECT_NAME=shopd-test
# Not 0: the engine would pick another one at each start of the gateway, and clients must find it again.
SHOPD_PORT=$(python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
export SHOPD_PORT
url=http://localhost:$SHOPD_PORT
export SHOPD_SECRETS=$work/secrets
load_pid=

finish() {
  local rc=$?
  trap - EXIT
  [ -z "$load_pid" ] || kill "$load_pid" 2>/dev/null || true
  if [ "$rc" != 0 ]; then
    docker compose ps -a >&2 || true
    docker compose logs --no-color --tail 20 >&2 || true
  fi
  docker compose --profile commands down --volumes --remove-orphans || rc=${rc/#0/1}
  rm -rf "$work"
  exit "$rc"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

shown=()
show() { shown+=("$*"); say "$*"; }

ids() { docker compose ps -q "$1"; }                     # SERVICE
inspect() { docker inspect --format "$1" "${@:2}"; }      # FORMAT CONTAINER…
network() { echo "${COMPOSE_PROJECT_NAME}_$1"; }          # NAME
address_on() { inspect "{{(index .NetworkSettings.Networks \"$(network "$2")\").IPAddress}}" "$1"; } # CONTAINER NETWORK
audit() { docker compose run --rm -T shopd audit --json | tail -n 1; }

# NETWORK HOST PORT: whether a container on that network reaches it, within two seconds
reaches() {
  docker run --rm --network "$(network "$1")" --entrypoint timeout postgres:17 2 bash -c "exec 3<>/dev/tcp/$2/$3" 2>/dev/null
}

# NETWORK ADDRESS PORT: what a role says there at /metrics
metrics() {
  docker run --rm --network "$(network "$1")" --entrypoint timeout postgres:17 5 \
    bash -c "exec 3<>/dev/tcp/$2/$3; printf 'GET /metrics HTTP/1.1\r\nHost: $2\r\nConnection: close\r\n\r\n' >&3; cat <&3"
}

start_load() { # ARG…: they come last, and outdo what is said here
  rm -f "$work/load.json" "$work/load.err" # else the last one's word that it has begun would be taken for this one's
  scripts/compose-load.py "$url" --rate "$rate" --books "$work/books.json" "$@" >"$work/load.json" 2>"$work/load.err" &
  load_pid=$!
  local deadline=$((SECONDS + 30))
  until grep -qs '^compose-load: asking' "$work/load.err"; do
    [ "$SECONDS" -lt "$deadline" ] && kill -0 "$load_pid" 2>/dev/null || die "the load does not begin: $(cat "$work/load.err")"
    sleep 0.1
  done
}

end_load() { # WHAT: ends it and says what it saw
  kill -TERM "$load_pid" 2>/dev/null || true # one that ended by itself says why
  local rc=0
  wait "$load_pid" || rc=$?
  load_pid=
  [ "$rc" = 0 ] || die "$1: $(cat "$work/load.err" "$work/load.json")"
  show "$1: $(cat "$work/load.json")"
}

until_healthy() { # CONTAINER
  local deadline=$((SECONDS + 120))
  until [ "$(inspect '{{.State.Health.Status}}' "$1")" = healthy ]; do
    [ "$SECONDS" -lt "$deadline" ] || die "$1 is not healthy within 120 s"
    sleep 0.2
  done
}

restart_each() { # SERVICE: its containers one after the other, each healthy before the next
  local id
  for id in $(ids "$1"); do
    docker restart --time 15 "$id" >/dev/null
    until_healthy "$id"
  done
}

memory() { # WHEN
  docker stats --no-stream --format '{{.Name}} {{.MemUsage}}' $(docker compose ps -q) | sed -E "s/^${COMPOSE_PROJECT_NAME}-//" | sort \
    | awk -v when="$1" '{printf "%s%s %s", (NR > 1 ? ", " : "memory " when ": "), $1, $2} END {print ""}'
}

# --- the parts ------------------------------------------------------------------------------------------------------

secrets_of_its_own() { # that nobody but their owner may read, and that would break a url
  for name in orders payments; do
    [ -s "deploy/compose/secrets/${name}_db_password" ] || die "deploy/compose/secrets/${name}_db_password is missing or empty"
  done
  (umask 077; mkdir "$SHOPD_SECRETS"; printf '%s\n' 'o@:/?#%& "é$' >"$SHOPD_SECRETS/orders_db_password"; printf '%s' "p'\\+=;{}" >"$SHOPD_SECRETS/payments_db_password")
}

up() {
  local began=$SECONDS
  docker compose build
  show "the image is built in $((SECONDS - began)) s"
  began=$SECONDS
  docker compose up -d --wait --wait-timeout 300
  show "all healthy in $((SECONDS - began)) s"
}

image() {
  local bytes
  bytes=$(docker image inspect --format '{{.Size}}' shopd:local)
  [ "$bytes" -le "$image_bytes_max" ] || die "the image has $bytes bytes, more than $image_bytes_max"
  [ "$(docker image inspect --format '{{.Config.User}}' shopd:local)" = 65532:65532 ] || die 'the image runs as another user'
  docker image inspect --format '{{json .Config.Labels}}' shopd:local | grep -q '"org.opencontainers.image.version":"[0-9]' || die 'the image says no version'
  show "the image has $((bytes / 1000000)) MB"
}

bounds() { # of each container of the shop
  local id name what
  for id in $(docker compose ps -aq); do
    name=$(inspect '{{.Name}}' "$id")
    what=$(inspect '{{.HostConfig.CapDrop}} {{.HostConfig.SecurityOpt}}' "$id")
    [ "$what" = '[ALL] [no-new-privileges:true]' ] || die "$name: $what"
    what=$(inspect '{{.HostConfig.CapAdd}}' "$id")
    [ "$what" = '[]' ] || [[ $name == *-db-* || $name == *-secrets-* ]] || die "$name keeps capabilities: $what"
    what=$(inspect '{{.HostConfig.ReadonlyRootfs}}' "$id")
    [ "$what" = true ] || [[ $name == *-kafka-* ]] || die "$name: its root can be written"
    what=$(inspect '{{.HostConfig.Memory}} {{.HostConfig.NanoCpus}} {{.HostConfig.PidsLimit}} {{index .HostConfig.LogConfig.Config "max-size"}}' "$id")
    [[ $what =~ ^[1-9][0-9]*\ [1-9][0-9]*\ [1-9][0-9]*\ [1-9] ]] || die "$name: no bound on memory, processors, processes or logs: $what"
    what=$(inspect '{{.HostConfig.CpuShares}}' "$id")
    [[ $name != *-db-* && $name != *-kafka-* ]] || [ "$what" = 4096 ] || die "$name gives way to the roles: it has a share of $what"
    what=$(inspect '{{range $port, $at := .NetworkSettings.Ports}}{{if $at}}{{$port}} {{end}}{{end}}' "$id")
    [[ $name == *-gateway-* ]] && [ "$what" = '8000/tcp ' ] || [ -z "$what" ] || die "$name publishes $what"
    what=$(inspect '{{.Config.Env}}' "$id")
    [[ $what != *'o@:/'* && $what != *"p'"* && $what != *o%40* && $what != *p%27* ]] || die "$name has a password in its environment"
  done
  # What the broker itself says that it goes by.
  [[ $(docker compose logs kafka 2>&1) == *'log.flush.interval.ms = 5000'* ]] || die 'kafka leaves its flushes to the kernel'
  if docker compose run --rm -T --entrypoint /bin/sh shopd -c true 2>/dev/null; then die 'the image has a shell'; fi
  show "$(docker compose ps -aq | wc -l) containers: nothing published but the gateway, no capabilities, no way to gain one, each with its bounds"
}

networks() {
  local db=5432 kafka=9092 each
  # Each first from where it may be asked: a probe that reaches nothing would show nothing.
  reaches orders-data orders-db $db || die 'orders-db is not reached from its own network'
  reaches payments-data payments-db $db || die 'payments-db is not reached from its own network'
  reaches log kafka $kafka || die 'kafka is not reached from its own network'
  reaches front orders 8082 || die 'orders is not reached from the front'
  local orders_db payments_db broker
  orders_db=$(address_on "$(ids orders-db)" orders-data) payments_db=$(address_on "$(ids payments-db)" payments-data)
  broker=$(address_on "$(ids kafka)" log)
  reaches orders-data "$orders_db" $db || die 'orders-db is not reached by its address'
  for each in edge front; do # where the gateway is; by name and by address
    for at in "orders-db $db" "$orders_db $db" "payments-db $db" "$payments_db $db" "kafka $kafka" "$broker $kafka"; do
      # shellcheck disable=SC2086 # a host and a port
      if reaches "$each" $at; then die "$at is reached from $each"; fi
    done
  done
  if reaches payments-data "$orders_db" $db; then die 'orders-db is reached from the network of payments'; fi
  if reaches orders-data "$payments_db" $db; then die 'payments-db is reached from the network of orders'; fi
  [ "$(inspect '{{range $name, $_ := .NetworkSettings.Networks}}{{$name}} {{end}}' "$(ids gateway)")" = "$(network edge) $(network front) " ] || die 'the gateway is on other networks'
  [[ $(inspect '{{range $name, $_ := .NetworkSettings.Networks}}{{$name}} {{end}}' "$(ids payments)") != *orders-data* ]] || die 'payments is on the network of the orders database'
  for each in front orders-data payments-data log; do
    [ "$(docker network inspect --format '{{.Internal}}' "$(network $each)")" = true ] || die "$each has a way out"
  done
  show 'databases and Kafka are reached from their own networks, not from the gateway'\''s, nor by the wrong service'
}

busy() { # one of each role
  start_load --rate "$orders_rate" --orders-only --clients 16
  sleep 15 # of load
  show "$(memory "at $orders_rate orders/s, if so many were asked")"
  end_load 'under orders alone, one of each role'
}

scaled() {
  docker compose up -d --wait --wait-timeout 120 --no-recreate --scale orders=3 --scale payments=2 --scale relay=2
  start_load
  sleep 15 # of load, to be shared
  end_load 'under load with orders=3 payments=2 relay=2'
  local service port id said asked partitions sum
  for service in orders:8082 payments:8080; do
    port=${service#*:} service=${service%:*} sum=0 said=
    for id in $(ids $service); do
      metrics front "$(address_on "$id" front)" "$port" >"$work/metrics"
      asked=$(awk '/^shopd_http_requests_total\{/ && /method="POST"/ {n += $NF} END {print n + 0}' "$work/metrics")
      partitions=$(awk '/^shopd_consumer_lease_epoch\{/ && $NF > 0 {n++} END {print n + 0}' "$work/metrics")
      [ "$asked" -gt 0 ] || die "a replica of $service was asked for nothing"
      [ "$partitions" -gt 0 ] || die "a replica of $service has no partition"
      said+=" $asked/$partitions" sum=$((sum + partitions))
    done
    [ "$sum" = 12 ] || die "the replicas of $service have $sum partitions, of 12"
    show "$service: POSTs/partitions of each replica:$said"
  done
}

rolling() {
  local service
  for service in orders payments relay; do
    start_load
    restart_each "$service"
    end_load "rolling restart of $service, no request repeated by the client"
  done
  start_load --repeat all # it may answer 503 before it has found its services
  docker compose restart --timeout 15 gateway >/dev/null 2>&1
  until_healthy "$(ids gateway)"
  sleep 2 # of load
  end_load 'restart of the one gateway, the client asks again under its Idempotency-Key what got no answer or 5xx'
  grep -q '"repeated": [1-9]' "$work/load.json" || die 'the gateway was restarted and no client noticed: it was not under load'
}

replaced() { # each role by a new one beside it, where there is one of each
  start_load
  scripts/compose-roll.sh relay orders payments
  sleep 2 # of load
  end_load 'orders, payments and relay replaced by compose-roll.sh, no request repeated by the client'
}

behind() { # what has only one container, and keeps the data
  local service
  for service in orders-db payments-db kafka; do
    start_load --repeat all
    docker compose restart --timeout 30 "$service" >/dev/null 2>&1
    until_healthy "$(ids "$service")"
    sleep 5 # of load
    end_load "restart of $service, the client asks again what got no answer or 5xx"
  done
}

audited() { # WHEN
  local found
  found=$(audit) || die "the audit $1: $found"
  [[ $found == *'"ok":true'* && $found == *'"offences":0'* ]] || die "the audit $1: $found"
  show "audit $1: $(python3 -c 'import json, sys
of = json.loads(sys.argv[1])["summary"]
print(", ".join(f"{of[name]} {name}" for name in ("offences", "orders", "payments", "accounts", "transfers", "records")))' "$found")"
}

kept() {
  docker compose down
  local began=$SECONDS
  docker compose up -d --wait --wait-timeout 300
  show "down, and all healthy again in $((SECONDS - began)) s"
  show "kept: $(scripts/compose-load.py "$url" --look-again "$work/books.json")"
  scripts/compose-check.sh "$url"
}

secrets_of_its_own
up
scripts/compose-check.sh "$url"
image
bounds
networks
docker compose --profile observability --profile commands config --quiet
show "$(memory 'at rest')"
busy
scaled
show "$(memory 'after load')"
rolling
behind
audited 'after all restarts'
kept
replaced
audited 'after down, up and replacing'
say "all as it should be, in $SECONDS s:"
printf '  %s\n' "${shown[@]}" >&2
