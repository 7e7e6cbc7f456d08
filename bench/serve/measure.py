#!/usr/bin/env python3
"""The server beside the engine alone, in one run: throughput, overhead, latencies under load.

Usage: bench/serve/measure.py FATHOM MODEL --data STORE [--rounds N] [--requests N] [--device cuda] [--server "FLAGS"]
                              [-o LINES.jsonl]

Starts `fathom serve MODEL`, and then, in turn so that both meet the same machine:
  warm-up   the server gets all the requests that it is measured by, once; bench batch does so by itself (--warm-up)
  batch     `fathom bench batch`: all requests at once through the engine, no server
  closed    `fathom bench load` with 64 clients, streams and whole answers: the same requests to the server
  overhead  requests of one new token, one after the other, alone in the engine and through the server
  open      Poisson arrivals at 50 and 90 % of the requests a second that the closed loop got
The same requests come again and again, so the server has no prefix cache: it would find their prompts there, and the
engine alone computes them. Prints a line of JSON for each, and a table at the end (on standard error). What FATHOM_API_KEY says is used by both.
Needs Python 3.8 alone.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time


def say(text):
    print(text, file=sys.stderr, flush=True)


class Bench:
    def __init__(self, flags):
        self.flags = flags
        self.lines = open(flags.output, "w") if flags.output else None
        self.common = ["--device", flags.device, "--threads", str(flags.threads)]
        self.engine = ["--sequences", str(flags.clients)] + shlex.split(flags.server)
        self.url = ""

    def fathom(self, *arguments):
        """The JSON that a command prints."""
        command = [self.flags.fathom, *map(str, arguments), "--json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
        if done.returncode != 0:
            sys.exit(f"{' '.join(command)}: {done.stderr}")
        return json.loads(done.stdout.strip().splitlines()[-1])

    def add(self, name, line, **more):
        line = {"name": name, **more, **line}
        text = json.dumps(line)
        print(text, flush=True)
        if self.lines:
            print(text, file=self.lines, flush=True)
        return line

    def work(self, requests, new_min=None, new_max=None, prompt=None):
        f = self.flags
        return ["--data", f.data, "--requests", requests, "--prompt-min", prompt or f.prompt_min, "--prompt-max",
                prompt or f.prompt_max, "--new-min", new_min or f.new_min, "--new-max", new_max or f.new_max, "--seed", f.seed]

    def batch(self, work, sequences=None):
        engine = ["--sequences", str(sequences or self.flags.clients)] + shlex.split(self.flags.server)
        return self.fathom("bench", "batch", self.flags.model, *work, *engine, *self.common)

    def load(self, work, *more):
        return self.fathom("bench", "load", self.url, *work, *more)


def start(bench):
    command = [bench.flags.fathom, "serve", bench.flags.model, "--port", "0", "--json", "--no-prefix-cache", *bench.engine,
               *bench.common]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, universal_newlines=True)
    line = server.stdout.readline()
    if not line:
        sys.exit("The server has not begun; what it said is above.")
    bench.url = json.loads(line)["url"]
    fit(bench.flags, json.loads(line)["context"])
    return server


def fit(flags, context):
    """A prompt and what follows it have to fit the model's context."""
    if flags.new_max is None:
        flags.new_max = min(128, context // 3)
    if flags.prompt_max is None:
        flags.prompt_max = min(256, context - flags.new_max)


def cpu_of(process):
    """CPU seconds of a process so far (Linux)."""
    with open(f"/proc/{process.pid}/stat") as stat:
        fields = stat.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def median_ratio(pairs):
    return statistics.median(a / b for a, b in pairs)


def measure(bench, server):
    f = bench.flags
    work = bench.work(f.requests)
    short = bench.work(f.requests, 1, 1, 16)
    for whole in ([], ["--whole"]):  # makes every choice and every block of memory
        bench.load(work, "--clients", f.clients, *whole)
    bench.load(short, "--clients", 1, "--whole")
    streams, wholes, rates = [], [], []
    shares = {"stream": [], "whole": []}
    for r in range(f.rounds):
        alone = bench.add("batch", bench.batch(work), round=r)
        for kind, pairs in (("stream", streams), ("whole", wholes)):
            cpu = cpu_of(server)
            through = bench.load(work, "--clients", f.clients, *(["--whole"] if kind == "whole" else []))
            used = cpu_of(server) - cpu
            shares[kind].append((used, alone["cpu_seconds"], through["cpu_seconds"]))
            bench.add(f"closed {kind}", through, round=r, server_cpu_seconds=used, of_batch=through["new_tok_s"] / alone["new_tok_s"])
            pairs.append((through["new_tok_s"], alone["new_tok_s"]))
            if kind == "stream":
                rates.append(through["request_s"])
    overheads = []
    for r in range(f.rounds):
        alone = bench.batch(short, sequences=1)
        through = bench.load(short, "--clients", 1, "--whole")
        ms = {p: through["request"][p] - alone["request"][p] for p in ("p50_ms", "min_ms")}
        overheads.append(ms)
        bench.add("overhead", {"overhead": ms, "alone": alone["request"], "through": through["request"]}, round=r)
    opened = []
    for share in f.loads:
        rate = share * statistics.median(rates)
        opened.append(bench.add("open", bench.load(work, "--rate", f"{rate:.4f}"), load=share))
    table(bench, streams, wholes, shares, overheads, opened)


def table(bench, streams, wholes, shares, overheads, opened):
    say(f"\n{len(streams)} rounds of {bench.flags.requests} requests, {bench.flags.clients} clients; load 1, 5 and 15 minutes: "
        + " ".join(f"{x:.1f}" for x in os.getloadavg()))
    say("| what | engine alone, tok/s | through the server, tok/s | share (median of the rounds) | CPU s: engine alone, "
        "server, generator |")
    say("| --- | --- | --- | --- | --- |")
    for name, kind, pairs in (("streams", "stream", streams), ("whole answers", "whole", wholes)):
        used, alone, generator = (statistics.median(s[i] for s in shares[kind]) for i in range(3))
        say(f"| {name} | {statistics.median(b for _, b in pairs):.0f} | {statistics.median(a for a, _ in pairs):.0f} | "
            f"{100 * median_ratio(pairs):.1f} % | {alone:.2f}, {used:.2f}, {generator:.2f} |")
    say("\noverhead of a request, the median's and the least, by round: "
        + ", ".join(f"{x['p50_ms']:.2f} and {x['min_ms']:.2f} ms" for x in overheads) + "\n")
    say("| load | requests/s | failed | first token p50, p90, p99 ms | between tokens p50, p90, p99 ms | generator's CPU s |")
    say("| --- | --- | --- | --- | --- | --- |")
    for line in opened:
        def three(times):
            return ", ".join(f"{times[p]:.1f}" for p in ("p50_ms", "p90_ms", "p99_ms"))
        say(f"| {100 * line['load']:.0f} % | {line['rate']:.2f} | {line['failed']} | {three(line['first_token'])} | "
            f"{three(line['inter_token'])} | {line['cpu_seconds']:.2f} |")


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("fathom")
    p.add_argument("model")
    p.add_argument("--data", required=True, help="token store of the model's tokenizer, whose text the prompts are")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--requests", type=int, default=256)
    p.add_argument("--clients", type=int, default=64)
    p.add_argument("--prompt-min", type=int, default=32)
    p.add_argument("--prompt-max", type=int, help="default: 256, or what the context has room for")
    p.add_argument("--new-min", type=int, default=16)
    p.add_argument("--new-max", type=int, help="default: 128, or a third of a shorter context")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--loads", type=float, nargs="+", default=[0.5, 0.9])
    p.add_argument("--device", default="auto")
    p.add_argument("--threads", type=int, default=0)
    p.add_argument("--server", default="", help="further flags of serve and of bench batch, such as '--kv 8'")
    p.add_argument("-o", "--output", help="the lines of JSON, in a file too")
    bench = Bench(p.parse_args())
    server = start(bench)
    begun = time.monotonic()
    try:
        measure(bench, server)
    finally:
        server.terminate()
        if server.wait() != 0:
            say("The server has not ended well.")
    say(f"{time.monotonic() - begun:.0f} s in all")


if __name__ == "__main__":
    main()
