#!/usr/bin/env python3
"""Asks a running shop through its gateway at a steady rate, until told to stop, and then holds the shop to what it was told.

    compose-load.py URL [--rate N] [--clients N] [--users N] [--orders-only] [--repeat nothing|broken|all] [--books FILE]
    compose-load.py URL --look-again FILE

Of ten requests six place an order, three read one, one deposits; with --orders-only all place one. SIGTERM or SIGINT ends the asking.
Then every order that was accepted must be there, once, and final, and every balance must be what was deposited less what was paid; FILE
keeps what was found, beside what earlier runs did, and --look-again compares a shop with it, later.

A request that got no answer, or one of 500 and more, is a failure. With --repeat broken one without an answer is asked again, with
--repeat all any of them, as a careful client does: a POST under the same Idempotency-Key, for half a minute.

Prints one line of JSON: what was asked, how often by status, what was repeated, what failed, how long it took (ms). Ends with 1 where
anything failed or is not as it should be. Wants Python 3.9 and nothing else.
"""

import argparse
import collections
import decimal
import http.client
import itertools
import json
import random
import signal
import socket
import sys
import threading
import time
import urllib.parse
import uuid

FINAL_S = 90  # until the last order is final: after Kafka's return the contract allows 30 s and what the backlog takes
REPEAT_S = 30  # for one request, repeats included
ANSWER_S = 15  # for one answer; the gateway's own bound is 10 s
PAUSE_S = 0.1  # between two repeats
PAGE = 500
FAILURES_SHOWN = 5
BALANCE = decimal.Decimal(1_000_000)
AMOUNT = decimal.Decimal("0.01")


class Lost(Exception):
    """No answer came: refused, reset, cut off or late."""


class Client:
    """One connection, kept as long as it lasts."""

    def __init__(self, url):
        parts = urllib.parse.urlsplit(url)
        self.host, self.port = parts.hostname, parts.port or 80
        self.connection = None
        self.next_cursor = None

    def ask(self, method, path, body=None, key=None):
        """The status and the parsed body. Raises Lost."""
        headers = {}
        if body is not None:
            headers["Content-Type"] = "application/json"
        if key is not None:
            headers["Idempotency-Key"] = key
        try:
            if self.connection is None:
                self.connection = http.client.HTTPConnection(self.host, self.port, timeout=ANSWER_S)
                self.connection.connect()
                self.connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.connection.request(method, path, body, headers)
            answer = self.connection.getresponse()
            text = answer.read()
            self.next_cursor = answer.headers.get("X-Next-Cursor")
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise Lost(f"{type(error).__name__}: {error}") from error
        if answer.will_close:
            self.close()
        return answer.status, json.loads(text, parse_float=decimal.Decimal) if text else None

    def close(self):
        if self.connection is not None:
            self.connection.close()
            self.connection = None


class Books:
    """What was asked, and what the shop said; shared by all clients."""

    def __init__(self):
        self.lock = threading.Lock()
        self.statuses = collections.Counter()
        self.lost = 0
        self.repeated = 0
        self.failures = []
        self.failed = 0
        self.asked = 0
        self.times_s = []
        self.orders = collections.defaultdict(list)
        self.deposited = collections.Counter()

    def fail(self, what):
        with self.lock:
            self.failed += 1
            if len(self.failures) < FAILURES_SHOWN:
                self.failures.append(what)


def ask(client, books, repeat, method, path, body=None):
    """The body of a 2xx; None where it failed, which is in the books then."""
    key = str(uuid.uuid4()) if method == "POST" else None
    began = time.monotonic()
    with books.lock:
        books.asked += 1
    while True:
        try:
            status, answer = client.ask(method, path, body, key)
        except Lost as error:
            status, answer, again = None, str(error), repeat != "nothing"
        else:
            again = repeat == "all" and status >= 500
        elapsed_s = time.monotonic() - began
        with books.lock:
            if status is None:
                books.lost += 1
            else:
                books.statuses[status] += 1
            if again and elapsed_s < REPEAT_S:
                books.repeated += 1
            else:
                again = False
                books.times_s.append(elapsed_s)
        if again:
            time.sleep(PAUSE_S)
            continue
        if status is not None and 200 <= status < 300:
            return answer
        books.fail(f"{method} {path}: {status or 'no answer'} {answer} after {elapsed_s:.1f} s")
        return None


def one(client, books, repeat, kind, users):
    user = random.choice(users)
    if kind < 6:
        body = json.dumps({"userId": user, "amount": float(AMOUNT), "description": "load"})
        order = ask(client, books, repeat, "POST", "/api/OrdersProxy", body)
        if order is not None:
            with books.lock:
                books.orders[user].append(order["id"])
    elif kind < 9:
        with books.lock:
            known = books.orders[user][-1] if books.orders[user] else None
        path = f"/api/OrdersProxy/{known}" if known else f"/api/PaymentsProxy/{user}/balance"
        ask(client, books, repeat, "GET", path)
    else:
        if ask(client, books, repeat, "POST", f"/api/PaymentsProxy/{user}/deposit", "1") is not None:
            with books.lock:
                books.deposited[user] += 1


def patiently(client, path):
    """A GET that has to succeed soon: what is looked at afterwards is not part of the load."""
    deadline = time.monotonic() + REPEAT_S
    while True:
        try:
            status, answer = client.ask("GET", path)
            if status == 200:
                return answer
            problem = f"{status} {answer}"
        except Lost as error:
            problem = str(error)
        if time.monotonic() > deadline:
            raise SystemExit(f"compose-load: {path}: {problem}")
        time.sleep(PAUSE_S)


def orders_of(client, user):
    """All of a user's orders, by id, and how often each was listed."""
    found, times = {}, collections.Counter()
    path = f"/api/OrdersProxy?userId={urllib.parse.quote(user)}&limit={PAGE}"
    cursor = ""
    while cursor is not None:
        for order in patiently(client, path + cursor):
            found[order["id"]] = order
            times[order["id"]] += 1
        cursor = f"&cursor={urllib.parse.quote(client.next_cursor)}" if client.next_cursor else None
    return found, times


def state_of(client, users):
    """What the shop says of these users: orders by status, and the balance, as text."""
    state, listed = {}, {}
    for user in users:
        found, times = orders_of(client, user)
        balance = patiently(client, f"/api/PaymentsProxy/{urllib.parse.quote(user)}/balance")["balance"]
        counts = collections.Counter(order["status"] for order in found.values())
        state[user] = {"orders": dict(sorted(counts.items())), "balance": str(decimal.Decimal(balance))}
        listed[user] = found, times
    return state, listed


def settle(client, users):
    """The state once no order waits any more, or at the bound."""
    deadline = time.monotonic() + FINAL_S
    while True:
        state, listed = state_of(client, users)
        waiting = sum(of["orders"].get("New", 0) for of in state.values())
        if not waiting or time.monotonic() > deadline:
            return state, listed, waiting
        time.sleep(0.5)


def wrong(books, state, listed, waiting):
    """What is not as it should be, a line each."""
    if waiting:
        yield f"{waiting} orders are not final within {FINAL_S} s"
    for user, (found, times) in listed.items():
        accepted = books.orders[user]
        missing = set(accepted) - set(found)
        extra = set(found) - set(accepted)
        twice = [order for order, count in times.items() if count > 1] + [o for o, c in collections.Counter(accepted).items() if c > 1]
        if missing or extra or twice:
            yield f"{user}: {len(missing)} accepted orders are missing, {len(extra)} are there that nobody placed, {len(twice)} are there twice"
        paid = sum(1 for order in found.values() if order["status"] == "Finished")
        expected = BALANCE + books.deposited[user] - paid * AMOUNT
        if decimal.Decimal(state[user]["balance"]) != expected:
            yield f"{user}: the balance is {state[user]['balance']}, and {expected} by the books"
        if any(order["status"] == "Cancelled" for order in found.values()):
            yield f"{user}: an order was cancelled, and there was money"


def quantile_ms(sorted_s, q):
    return round(sorted_s[min(len(sorted_s) - 1, int(q * len(sorted_s)))] * 1000, 1) if sorted_s else None


def load(args):
    users = [f"load-{uuid.uuid4()}" for _ in range(args.users)]
    client, books, stop = Client(args.url), Books(), threading.Event()
    for user in users:
        for path, body in ((f"/api/PaymentsProxy/{user}", None), (f"/api/PaymentsProxy/{user}/deposit", str(BALANCE))):
            status, answer = client.ask("POST", path, body)
            if status != 200:
                raise SystemExit(f"compose-load: {path}: {status} {answer}")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    turn, began = itertools.count(), time.monotonic()

    def run():
        # Each takes the next turn of all and waits for its time: one slow answer holds nobody else up.
        mine = Client(args.url)
        while not stop.is_set():
            number = next(turn)
            early_s = began + number / args.rate - time.monotonic()
            if early_s > 0 and stop.wait(early_s):
                return
            one(mine, books, args.repeat, 0 if args.orders_only else number % 10, users)

    threads = [threading.Thread(target=run) for _ in range(args.clients)]
    for thread in threads:
        thread.start()
    print("compose-load: asking", file=sys.stderr, flush=True)
    while not stop.wait(1) and not (args.seconds and time.monotonic() - began > args.seconds):
        pass
    stop.set()
    for thread in threads:
        thread.join(REPEAT_S + ANSWER_S)
    lasted_s = time.monotonic() - began
    state, listed, waiting = settle(client, users)
    problems = list(wrong(books, state, listed, waiting))
    if args.books:
        keep(args.books, state)
    times_s = sorted(books.times_s)
    placed = sum(len(orders) for orders in books.orders.values())
    print(json.dumps({
        "asked": books.asked, "per_s": round(books.asked / lasted_s, 1), "seconds": round(lasted_s, 1), "statuses": dict(sorted(books.statuses.items())),
        "no_answer": books.lost, "repeated": books.repeated, "failed": books.failed, "orders": placed, "orders_per_s": round(placed / lasted_s, 1),
        "p50_ms": quantile_ms(times_s, 0.5), "p99_ms": quantile_ms(times_s, 0.99), "max_ms": quantile_ms(times_s, 1), "wrong": len(problems),
    }))
    for line in books.failures + problems:
        print(f"compose-load: {line}", file=sys.stderr)
    return 1 if books.failed or problems or not placed else 0


def keep(name, state):
    """Adds to what earlier runs found."""
    try:
        with open(name, encoding="utf-8") as file:
            state = {**json.load(file), **state}
    except FileNotFoundError:
        pass
    with open(name, "w", encoding="utf-8") as file:
        json.dump(state, file)


def look_again(args):
    with open(args.look_again, encoding="utf-8") as file:
        before = json.load(file)
    after, _ = state_of(Client(args.url), list(before))
    differ = [user for user in before if after[user] != before[user]]
    for user in differ:
        print(f"compose-load: {user}: {before[user]} before, {after[user]} now", file=sys.stderr)
    orders = sum(sum(of["orders"].values()) for of in after.values())
    print(json.dumps({"users": len(before), "orders": orders, "differ": len(differ)}))
    return 1 if differ or not orders else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--rate", type=float, default=200, help="requests a second (200)")
    parser.add_argument("--clients", type=int, default=32, help="connections (32)")
    parser.add_argument("--users", type=int, default=20, help="accounts (20)")
    parser.add_argument("--orders-only", action="store_true", help="places orders, and asks nothing else")
    parser.add_argument("--seconds", type=float, default=0, help="stops by itself after so long")
    parser.add_argument("--repeat", choices=("nothing", "broken", "all"), default="nothing")
    parser.add_argument("--books", metavar="FILE", help="where to keep what was found at the end")
    parser.add_argument("--look-again", metavar="FILE", help="compares the shop with what was kept")
    args = parser.parse_args()
    return look_again(args) if args.look_again else load(args)


if __name__ == "__main__":
    sys.exit(main())
