#!/usr/bin/env bash
# Draws what an operator sees of a shop that runs: docs/pictures/dashboard.svg, our Grafana dashboard over three minutes of load with the
# broker away in the middle, and docs/pictures/trace.svg, one order's trace as a collector shows it.
#
#   pictures.sh [RATE]      requests a second (150); about five minutes
#
# The figures are a real Prometheus's (Debian's package), the spans a real Jaeger's: JAEGER names its program, else it is looked for in
# PATH (`go install github.com/jaegertracing/jaeger/cmd/all-in-one@v1.62.0`); without one no trace is drawn. Wants Python with venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { echo "pictures: $*" >&2; }
die() { say "$*"; exit 1; }

rate=${1:-150}
before_s=60 away_s=40 after_s=80
target=${CARGO_TARGET_DIR:-$PWD/target}
shopd=${SHOPD:-$target/release/shopd}
jaeger=${JAEGER:-$(command -v jaeger-all-in-one || command -v all-in-one || true)}
tools=$target/tools
work=$(mktemp -d)
chmod 755 "$work"
pids=()
finish() {
  local rc=$?
  trap - EXIT
  for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
  wait
  scripts/kafka/kafka wipe --dir "$work/kafka" >/dev/null 2>&1 || true
  [ "$rc" = 0 ] && rm -rf "$work" || say "the logs are in $work"
  exit "$rc"
}
trap finish EXIT
trap 'exit 130' INT TERM

scripts/need.sh test
command -v curl >/dev/null || die 'curl is missing'
[ -x "$shopd" ] || die "$shopd is missing: scripts/release.sh build --release --locked"

prometheus=$(command -v prometheus || echo "$tools/usr/bin/prometheus")
if [ ! -x "$prometheus" ]; then
  say "fetching Prometheus from Debian's package"
  command -v apt-get >/dev/null || die 'prometheus is missing (https://prometheus.io/download/)'
  (cd "$work" && { apt-get -qq download prometheus 2>/dev/null || { apt-get -qq update && apt-get -qq download prometheus; }; })
  mkdir -p "$tools"
  dpkg --fsys-tarfile "$work"/prometheus_*.deb | tar -x -C "$tools" ./usr/bin/prometheus
fi
if [ ! -x "$tools/pictures/bin/python" ]; then
  say 'fetching matplotlib'
  python3 -m venv "$tools/pictures"
  "$tools/pictures/bin/pip" -q install matplotlib
fi

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
until_answers() { # URL WHAT
  local deadline=$((SECONDS + 60))
  until curl -sf -o /dev/null --max-time 2 "$1"; do
    [ "$SECONDS" -lt "$deadline" ] || die "$2 does not answer: $work"
    sleep 0.2
  done
}

broker=$(scripts/kafka/kafka start --port 0 --dir "$work/kafka" | tail -n 1)
gateway=$(free_port) orders=$(free_port) payments=$(free_port) relay=$(free_port) metrics=$(free_port)
export SHOPD__KAFKA__BOOTSTRAP_SERVERS=$broker
for role in gateway orders payments relay; do
  declare -n port=$role
  export "SHOPD__${role^^}__LISTEN=127.0.0.1:$port"
done
traces=
if [ -n "$jaeger" ]; then
  otlp=$(free_port) traces=$(free_port)
  "$jaeger" --collector.otlp.http.host-port="127.0.0.1:$otlp" --collector.otlp.grpc.host-port="127.0.0.1:$(free_port)" \
    --query.http-server.host-port="127.0.0.1:$traces" --query.grpc-server.host-port="127.0.0.1:$(free_port)" \
    --collector.http-server.host-port="127.0.0.1:$(free_port)" --collector.grpc-server.host-port="127.0.0.1:$(free_port)" \
    --admin.http.host-port="127.0.0.1:$(free_port)" --memory.max-traces=1000 >"$work/jaeger.log" 2>&1 &
  pids+=($!)
  until_answers "http://127.0.0.1:$traces/api/services" Jaeger
  export SHOPD__TELEMETRY__OTLP_ENDPOINT=http://127.0.0.1:$otlp SHOPD__TELEMETRY__TRACE_ONE_IN=1000000
fi
"$shopd" --data-dir "$work/shop" all >"$work/shopd.log" 2>&1 &
pids+=($!)
until_answers "http://127.0.0.1:$gateway/health/ready" shopd

cat >"$work/prometheus.yml" <<YAML
global: {scrape_interval: 1s}
rule_files: [$PWD/deploy/prometheus/alerts.yml]
scrape_configs:
  - {job_name: shopd-all, static_configs: [{targets: ["127.0.0.1:$gateway"]}]}
YAML
"$prometheus" --config.file="$work/prometheus.yml" --storage.tsdb.path="$work/tsdb" --web.listen-address="127.0.0.1:$metrics" \
  >"$work/prometheus.log" 2>&1 &
pids+=($!)
until_answers "http://127.0.0.1:$metrics/-/ready" Prometheus

if [ -n "$traces" ]; then
  ask() { curl -sSf --max-time 10 "$@"; }
  trace=$(python3 -c 'import secrets; print(secrets.token_hex(16))')
  url=http://127.0.0.1:$gateway
  ask -o /dev/null -X POST "$url/api/PaymentsProxy/tracy"
  ask -o /dev/null -X POST "$url/api/PaymentsProxy/tracy/deposit" -H 'Content-Type: application/json' -d 100
  # The first order is made on cold connections; the third is like any other.
  for parent in "" "" "traceparent: 00-$trace-$(python3 -c 'import secrets; print(secrets.token_hex(8))')-01"; do
    ask -o /dev/null "$url/api/OrdersProxy" -H 'Content-Type: application/json' -H "$parent" \
      -H 'Prefer: wait=5' -d '{"userId":"tracy","amount":1,"description":"a book"}'
  done
  deadline=$((SECONDS + 20))
  until ask "http://127.0.0.1:$traces/api/traces/$trace" -o "$work/trace.json" 2>/dev/null &&
    [ "$(python3 -c 'import json, sys; print(len(json.load(open(sys.argv[1]))["data"][0]["spans"]))' "$work/trace.json")" -ge 7 ]; do
    [ "$SECONDS" -lt "$deadline" ] || die 'the trace did not come to Jaeger'
    sleep 0.5
  done
fi

begin=$(date +%s)
python3 scripts/compose-load.py "http://127.0.0.1:$gateway" --rate "$rate" >"$work/load.json" &
load=$!
pids+=("$load")
sleep "$before_s"
say 'the broker goes away'
scripts/kafka/kafka kill --dir "$work/kafka" >/dev/null
sleep "$away_s"
say 'the broker comes back'
scripts/kafka/kafka start --dir "$work/kafka" >/dev/null
sleep "$after_s"
kill -TERM "$load"
wait "$load" || die "the load met failures: $(cat "$work/load.json")"
say "the load: $(cat "$work/load.json")"

mkdir -p docs/pictures
draw() { "$tools/pictures/bin/python" scripts/pictures.py "$@"; }
draw dashboard deploy/grafana/shopd.json "http://127.0.0.1:$metrics" "$begin" "$(date +%s)" docs/pictures/dashboard.svg
[ -z "$traces" ] || draw trace "$work/trace.json" docs/pictures/trace.svg
