#!/usr/bin/env bash
# Asks a running shop for what it is there for, from the outside, through the gateway alone: an account, a deposit, an order that is
# paid, one that cannot be, the documents. Ends non-zero at the first thing that is not so. Wants only bash and curl.
#
#   compose-check.sh [URL]      default: http://localhost, at the port that compose.yaml publishes (SHOPD_PORT, else 8000)
set -euo pipefail

url=${1:-http://localhost:${SHOPD_PORT:-8000}}
ready_s=60 # for a shop that was just started
final_s=30 # for an order's way through both databases and the broker

say() { echo "compose-check: $*" >&2; }
die() { say "FAILED: $*"; exit 1; }

# METHOD PATH [JSON]: $status and $body of the answer; status 000 when there is none
ask() {
  local data=()
  [ $# -lt 3 ] || data=(-H 'Content-Type: application/json' --data-binary "$3")
  body=$(curl -sS --connect-timeout 5 --max-time 15 -X "$1" ${data[@]+"${data[@]}"} -w '\n%{http_code}' "$url$2" 2>&1) || true
  status=${body##*$'\n'}
  body=${body%$'\n'*}
}

expect() { # STATUS WHAT
  [ "$status" = "$1" ] || die "$2: expected $1, got $status: ${body:0:600}"
}

field() { # NAME: the value of a top-level field of $body, without quotes; what is nested in an answer here does not repeat these names
  sed -nE "s/.*\"$1\":(\"([^\"]*)\"|([^,}]*)).*/\2\3/p" <<<"$body"
}

holds() { # NAME VALUE WHAT
  [ "$(field "$1")" = "$2" ] || die "$3: expected $1 $2: ${body:0:600}"
}

until_ready() {
  local deadline=$((SECONDS + ready_s))
  while ask GET /health/ready; [ "$status" != 200 ]; do
    [ "$SECONDS" -lt "$deadline" ] || die "not ready within $ready_s s: $status ${body:0:600}"
    sleep 0.5
  done
}

place() { # AMOUNT: $order is its id
  ask POST /api/OrdersProxy "{\"userId\":\"$user\",\"amount\":$1,\"description\":\"a book\"}"
  expect 201 "an order over $1"
  holds status New "an order over $1"
  order=$(field id)
  [[ $order =~ ^[0-9a-f-]{36}$ ]] || die "an order without an id: $body"
}

until_final() { # STATUS: waits for $order, which must end so
  local deadline=$((SECONDS + final_s))
  while ask GET "/api/OrdersProxy/$order"; expect 200 "order $order"; [ "$(field status)" = New ]; do
    [ "$SECONDS" -lt "$deadline" ] || die "order $order is not final within $final_s s: $body"
    sleep 0.1
  done
  holds status "$1" "order $order"
}

balance() { # VALUE WHAT
  ask GET "/api/PaymentsProxy/$user/balance"
  expect 200 "the balance $2"
  holds balance "$1" "the balance $2"
}

user=check-$(date +%s)-$$-$RANDOM

until_ready
ask GET /health/live
expect 200 'the gateway lives'
say "the gateway is live and ready at $url"

ask POST "/api/PaymentsProxy/$user"
expect 200 'an account'
holds userId "$user" 'an account'
holds balance 0 'a new account'
ask POST "/api/PaymentsProxy/$user"
expect 409 'an account twice'
holds code account_exists 'an account twice'
ask POST "/api/PaymentsProxy/$user/deposit" 100.5
expect 200 'a deposit'
holds balance 100.5 'a deposit'
say "$user has an account and 100.5"

place 42.5
until_final Finished
holds failureReason null 'a paid order'
balance 58 'after a paid order'
say "order $order is paid"

place 58.01
until_final Cancelled
holds failureReason insufficient_funds 'an order above the balance'
balance 58 'after an order that was cancelled'
say "order $order is cancelled for want of money"

ask GET "/api/OrdersProxy?userId=$user"
expect 200 "the user's orders"
[ "$(grep -o '"amount":' <<<"$body" | wc -l)" = 2 ] || die "the user's orders: expected two: ${body:0:600}"

ask GET /swagger/v1/swagger.json
expect 200 'the OpenAPI document'
[[ $body == *'"openapi":"3'* ]] || die "the OpenAPI document is none: ${body:0:200}"
[[ $body == *'"/api/OrdersProxy"'* && $body == *'"/api/PaymentsProxy/{userId}"'* ]] || die 'the OpenAPI document lacks a service'
[[ $body != *'"x-shopd-partial"'* ]] || die 'the OpenAPI document is partial, with every service up'
ask GET /swagger
case $status in 200 | 30[1278]) ;; *) die "Swagger UI: $status ${body:0:200}" ;; esac
say 'the OpenAPI document and Swagger UI are served'

say 'all as it should be'
