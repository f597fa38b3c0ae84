#!/usr/bin/env bash
# Asks a shop of its own for everything that its OpenAPI document allows and much that it forbids, through the gateway, and holds every
# answer against that document. Wants Python 3.10 or later with venv, and curl; schemathesis comes into target/fuzz/.
#
#   fuzz.sh [EXAMPLES]      cases an operation and phase, 50 where nothing is said; SEED=n repeats a run, FUZZ_S bounds it in seconds (900),
#                           SHOPD=PROGRAM is asked instead of a build
#
# Left out: /ws, which no HTTP client can use, and the stream of a user, which never ends. Of an order's stream only what orders that
# have ended can give, so that it ends.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

examples=${1:-50} fuzz_s=${FUZZ_S:-900}
version=4.32.5 # of schemathesis
start_s=60     # for the shop to be ready
case_s=15      # for one request

say() { echo "fuzz: $*" >&2; }
die() { say "$*"; exit 1; }

[[ $examples =~ ^[1-9][0-9]*$ ]] || die "EXAMPLES must be a number above 0, not '$examples'"
command -v curl >/dev/null || die 'curl is missing'
command -v python3 >/dev/null || die 'python3 is missing'
python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || die "Python 3.10 or later is needed, this is $(python3 --version)"
target=${CARGO_TARGET_DIR:-$PWD/target}
venv=$target/fuzz/venv
if [ "$("$venv/bin/pip" show schemathesis 2>/dev/null | sed -n 's/^Version: //p')" != "$version" ]; then
  say "installing schemathesis $version into $venv"
  python3 -m venv "$venv" || die 'python3 has no venv (Debian: python3-venv)'
  "$venv/bin/pip" install -q "schemathesis==$version" || die 'schemathesis could not be installed (it comes from PyPI)'
fi

shopd=${SHOPD:-}
if [ -z "$shopd" ]; then
  scripts/need.sh build
  cargo build --locked
  shopd=$target/debug/shopd
fi
[ -x "$shopd" ] || die "$shopd is no program"

dir=$(mktemp -d "${TMPDIR:-/tmp}/shopd-fuzz-XXXXXX") pid=
finish() {
  local rc=$?
  trap - EXIT
  if [ -n "$pid" ]; then
    kill -TERM "$pid" 2>/dev/null || true
    wait "$pid" || { say 'the shop did not end well'; rc=1; }
  fi
  rm -rf "$dir" "$dir.json"
  if [ "$rc" = 0 ]; then rm -f "$dir.log"; else say "the shop's log: $dir.log"; fi
  exit "$rc"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

for role in GATEWAY ORDERS PAYMENTS RELAY; do export "SHOPD__${role}__LISTEN=127.0.0.1:0"; done
"$shopd" all --data-dir "$dir" --log json 2>"$dir.log" &
pid=$!
url=
for ((i = 0; i < start_s * 10; i++)); do
  kill -0 "$pid" 2>/dev/null || die "the shop does not start: $(tail -n 3 "$dir.log")"
  address=$(sed -n '/"role":"gateway"/s/.*"address":"\([^"]*\)".*/\1/p' "$dir.log" | head -n 1)
  if [ -n "$address" ] && curl -sf -m 5 -o /dev/null "http://$address/health/ready"; then
    url=http://$address
    break
  fi
  sleep 0.1
done
[ -n "$url" ] || die "the shop is not ready after $start_s s"

# What the document's examples name is there, so that not everything is 404.
ask() { curl -sS -m "$case_s" -o /dev/null -H 'Content-Type: application/json' "$@"; }
ask -X POST "$url/api/PaymentsProxy/alice"
ask -d 1000 "$url/api/PaymentsProxy/alice/deposit"
order='{"orderId":"3f2504e0-4f89-11d3-9a0c-0305e82c3301","userId":"alice","amount":100.5,"description":"A book"}'
ask -H 'Prefer: wait=20' -d "$order" "$url/api/OrdersProxy"

# OpenAPI 3.0 has no word for what one event of a stream is, so that is said here: an order.
curl -sSf -m "$case_s" "$url/swagger/v1/swagger.json" | python3 -c '
import json, sys
document = json.load(sys.stdin)
data = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"$ref": "#/components/schemas/Order"}}
event = {"type": "object", "required": ["id", "data"], "properties": {"id": {"type": "string", "pattern": "^[0-9]+-[0-9]+"}, "data": data}}
for path in document["paths"].values():
    for operation in path.values():
        for answer in operation["responses"].values():
            if "text/event-stream" in answer.get("content", {}):
                answer["content"]["text/event-stream"] = {"itemSchema": event}
json.dump(document, sys.stdout)' >"$dir.json" || die 'no document'

checks=not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,response_schema_conformance
checks=$checks,unsupported_method,allow_header_conformance,missing_required_header
say "asking $url, $examples examples an operation and phase, at most $fuzz_s s"
st=("$venv/bin/st" run "$dir.json" --url "$url" --checks "$checks"
  --max-examples "$examples" --request-timeout "$case_s" --phases examples,coverage,fuzzing,stateful --continue-on-failure
  --exclude-path '/api/OrdersProxy/{orderId}/ws' --exclude-path /api/OrdersProxy/events --max-redirects 0
  --generation-database none --no-color)
[ -z "${SEED:-}" ] || st+=(--seed "$SEED")
(cd "$target/fuzz" && timeout "$fuzz_s" "${st[@]}") || die "an answer is not as the document says, or it took longer than $fuzz_s s"

# Nothing of ours may have broken unseen: a 5xx is logged with its cause.
! grep -q '"level":"ERROR"' "$dir.log" || die "the shop logged errors: $(grep -m 3 '"level":"ERROR"' "$dir.log")"
kill -0 "$pid" 2>/dev/null || die 'the shop has ended'
