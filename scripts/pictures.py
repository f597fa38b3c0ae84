#!/usr/bin/env python3
"""Draws what an operator sees, as SVG, without a browser.

    pictures.py dashboard DASHBOARD.json PROMETHEUS_URL BEGIN END OUT.svg
        the panels of a Grafana dashboard, each with what Prometheus answers to its own expressions from BEGIN to END (Unix seconds)
    pictures.py trace SPANS.json OUT.svg
        one trace as a waterfall; SPANS.json is what Jaeger's /api/traces/ID answers

Wants matplotlib.
"""
import json
import re
import sys
import urllib.parse
import urllib.request

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter

STEP_S = 1
RATE_INTERVAL = "10s"  # what Grafana makes of $__rate_interval where the scrape interval is a second or two
COLUMNS, ROW_HEIGHT = 24, 0.34

plt.rcParams.update({"font.size": 7, "axes.titlesize": 8, "svg.hashsalt": "shopd", "svg.fonttype": "none"})


def scaled(value, unit):
    if unit == "s":
        return f"{value * 1000:.3g} ms" if abs(value) < 1 else f"{value:.3g} s"
    if unit == "bytes":
        return f"{value / 2**20:.3g} MiB"
    if unit == "percentunit":
        return f"{value * 100:.3g} %"
    if abs(value) >= 10_000:
        return f"{value / 1000:.4g} k"
    return f"{value:.4g}"


def ask(prometheus, expression, begin, end):
    expression = expression.replace("$__rate_interval", RATE_INTERVAL)
    query = urllib.parse.urlencode({"query": expression, "start": begin, "end": end, "step": STEP_S})
    with urllib.request.urlopen(f"{prometheus}/api/v1/query_range?{query}", timeout=30) as answer:
        return json.load(answer)["data"]["result"]


def legend(template, labels):
    return re.sub(r"{{\s*(\w+)\s*}}", lambda found: labels.get(found[1], ""), template or "") or "value"


def dashboard(path, prometheus, begin, end, out):
    begin, end = float(begin), float(end)
    board = json.load(open(path))
    panels = board["panels"]
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    figure = plt.figure(figsize=(15, height * ROW_HEIGHT))
    drawn = 0
    for panel in panels:
        place = panel["gridPos"]
        left, top = place["x"] / COLUMNS, 1 - place["y"] / height
        if panel["type"] == "row":
            figure.text(0.01, top - 0.6 / height, panel["title"], fontsize=10, weight="bold")
            continue
        axes = figure.add_axes([
            left + 0.035,
            top - (place["h"] - 1.2) / height,
            place["w"] / COLUMNS - 0.05,
            (place["h"] - 2.6) / height,
        ])
        axes.set_title(panel["title"], loc="left")
        unit = panel.get("fieldConfig", {}).get("defaults", {}).get("unit")
        for target in panel["targets"]:
            for series in ask(prometheus, target["expr"], begin, end):
                points = [(float(at) - begin, float(value)) for at, value in series["values"] if value != "NaN"]
                if points:
                    axes.plot(*zip(*points), linewidth=0.9, label=legend(target.get("legendFormat"), series["metric"]))
                    drawn += 1
        axes.set_xlim(0, end - begin)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f} s"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _, unit=unit: scaled(value, unit)))
        axes.grid(linewidth=0.3)
        if 0 < len(axes.lines) <= 12:
            axes.legend(fontsize=5, loc="upper left", framealpha=0.6)
    if not drawn:
        sys.exit("pictures: Prometheus answered no panel at all")
    figure.savefig(out, metadata={"Date": None})
    print(f"pictures: {out}: {drawn} series of {sum(panel['type'] != 'row' for panel in panels)} panels", file=sys.stderr)


def trace(path, out):
    found = json.load(open(path))["data"][0]
    services = {key: process["serviceName"] for key, process in found["processes"].items()}
    spans = sorted(found["spans"], key=lambda span: span["startTime"])
    by_id = {span["spanID"]: span for span in spans}

    def parent(span):
        return next((by_id.get(one["spanID"]) for one in span["references"] if one["refType"] == "CHILD_OF"), None)

    def depth(span):
        above = parent(span)
        return 0 if above is None else 1 + depth(above)

    ordered = []

    def walk(above):
        for span in spans:
            if parent(span) is above:
                ordered.append(span)
                walk(span)

    walk(None)
    begin = spans[0]["startTime"]
    colours = dict(zip(sorted(set(services.values())), plt.get_cmap("tab10").colors))
    figure, axes = plt.subplots(figsize=(11, 0.5 * len(ordered) + 1))
    for row, span in enumerate(ordered):
        service = services[span["processID"]]
        at, took = (span["startTime"] - begin) / 1000, span["duration"] / 1000
        axes.barh(row, max(took, 0.03), left=at, height=0.55, color=colours[service])
        for log in span.get("logs", []):
            axes.plot((log["timestamp"] - begin) / 1000, row, "k|", markersize=9)
        axes.annotate(f" {took:.2f} ms", (at + took, row), va="center")
    axes.set_yticks(range(len(ordered)))
    axes.set_yticklabels(["  " * depth(span) + f"{services[span['processID']]}: {span['operationName']}" for span in ordered], ha="left")
    axes.tick_params(axis="y", pad=230, length=0)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds since the request; a stroke in a bar is when its page was published, or its batch's transaction began")
    axes.margins(x=0.1)
    axes.grid(axis="x", linewidth=0.3)
    figure.savefig(out, metadata={"Date": None}, bbox_inches="tight")
    print(f"pictures: {out}: {len(ordered)} spans", file=sys.stderr)


match sys.argv[1:]:
    case ["dashboard", path, prometheus, begin, end, out]:
        dashboard(path, prometheus, begin, end, out)
    case ["trace", path, out]:
        trace(path, out)
    case _:
        sys.exit(__doc__)
