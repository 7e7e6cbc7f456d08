#!/usr/bin/env python3
"""A server under full load and rude clients for minutes: memory, blocks, and whether any answer is wrong.

Usage: bench/serve/soak.py FATHOM MODEL --data STORE [--minutes M] [--server "FLAGS"] [--idle N] [-o LINES.jsonl]

`fathom serve --invariant` gets 64 clients that ask one request after the other (`fathom bench load`), and beside them:
clients that leave in the middle of a stream, or read nothing of it, requests that are no HTTP or no JSON, senders that
stop half-way, idle connections. Every second /health has to answer; every few a text is asked for again that was asked
for before the load, and has to be the same, byte for byte. A line of JSON every ten seconds: seconds, memory, requests,
free blocks. Exit status 1: memory grew by more than a tenth after the first third, a block is missing at the end, an
answer differed, a request failed, or /health did not answer.
Needs Python 3.8 alone, and Linux.
"""

import argparse
import http.client
import json
import random
import shlex
import socket
import struct
import subprocess
import sys
import threading
import time

QUESTION = {"prompt": [5, 6, 7, 8], "max_tokens": 24, "temperature": 0, "ignore_eos": True}


class Server:
    def __init__(self, flags):
        command = [flags.fathom, "serve", flags.model, "--port", "0", "--json", "--invariant", *shlex.split(flags.server)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, universal_newlines=True)
        line = self.process.stdout.readline()
        if not line:
            sys.exit("The server has not begun; what it said is above.")
        self.url = json.loads(line)["url"]
        # A prompt and what follows it have to fit the model's context.
        context = json.loads(line)["context"]
        self.new_max = min(100, context // 3)
        self.prompt_max = min(200, context - self.new_max)
        self.host, port = self.url.split("//")[1].split(":")
        self.port = int(port)

    def ask(self, method, path, body=None, seconds=60):
        connection = http.client.HTTPConnection(self.host, self.port, timeout=seconds)
        try:
            connection.request(method, path, json.dumps(body) if body is not None else None)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def metric(self, name):
        for line in self.ask("GET", "/metrics")[1].decode().splitlines():
            if line.startswith(name + " "):
                return float(line.split()[1])
        return float("nan")

    def kilobytes(self):
        with open(f"/proc/{self.process.pid}/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))

    def connect(self):
        return socket.create_connection((self.host, self.port), timeout=60)


def request(body, path="/v1/completions"):
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    return b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (path.encode(), len(text)) + text


class Rude:
    """One of the clients that do what they should not, over and over."""

    def __init__(self, server, seed, ends, counts):
        self.server, self.random, self.ends, self.counts = server, random.Random(seed), ends, counts

    def run(self):
        kinds = [self.leaves, self.reads_nothing, self.nonsense, self.half, self.half_closes]
        while not self.ends.is_set():
            kind = self.random.choice(kinds)
            try:
                kind()
            except OSError:
                pass  # the server is free to hang up on them
            self.counts[kind.__name__] = self.counts.get(kind.__name__, 0) + 1
            self.ends.wait(self.random.uniform(0, 0.2))

    def stream(self, tokens=200):
        return request(dict(QUESTION, max_tokens=tokens, stream=True, prompt=[self.random.randrange(50) + 3] * 9))

    def leaves(self):
        with self.server.connect() as s:
            s.sendall(self.stream())
            if self.random.random() < 0.7:
                s.recv(200)
            if self.random.random() < 0.5:  # as a reset
                s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def reads_nothing(self):
        with self.server.connect() as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            s.sendall(self.stream())
            self.ends.wait(self.random.uniform(0.5, 3))

    def nonsense(self):
        good = bytearray(self.stream(1))
        for _ in range(self.random.randrange(1, 8)):
            good[self.random.randrange(len(good))] = self.random.randrange(256)
        with self.server.connect() as s:
            s.settimeout(0.5)
            s.sendall(good)
            s.recv(100)

    def half(self):
        with self.server.connect() as s:
            text = self.stream()
            s.sendall(text[:self.random.randrange(len(text))])
            self.ends.wait(self.random.uniform(0, 1))

    def half_closes(self):
        with self.server.connect() as s:
            s.sendall(request(dict(QUESTION, max_tokens=4)))
            s.shutdown(socket.SHUT_WR)
            while s.recv(4096):
                pass


class Soak:
    def __init__(self, flags, server):
        self.flags, self.server = flags, server
        self.ends = threading.Event()
        self.faults, self.counts = [], {}
        self.asked = self.failed = self.tokens = 0

    def load(self):
        seed = 1
        while not self.ends.is_set():
            command = [self.flags.fathom, "bench", "load", self.server.url, "--data", self.flags.data, "--clients",
                       str(self.flags.clients), "--requests", str(8 * self.flags.clients), "--seed", str(seed), "--json",
                       "--prompt-max", str(self.server.prompt_max), "--new-max", str(self.server.new_max),
                       "--whole" if seed % 4 == 0 else "--verbose"]
            done = subprocess.run(command, stdout=subprocess.PIPE, universal_newlines=True)
            if done.returncode != 0:
                self.faults.append(f"bench load ended with status {done.returncode}")
                return
            line = json.loads(done.stdout)
            self.asked += line["requests"]
            self.failed += line["failed"]
            self.tokens += line["new_tokens"]
            seed += 1

    def watch_health(self):
        while not self.ends.wait(1):
            try:
                status = self.server.ask("GET", "/health", seconds=20)[0]
            except OSError as e:
                status = e
            if status != 200:
                self.faults.append(f"/health: {status}")

    def ask_again(self, first):
        while not self.ends.wait(5):
            status, body = self.server.ask("POST", "/v1/completions", QUESTION, seconds=300)
            if status != 200 or json.loads(body)["choices"] != first:
                self.faults.append(f"another answer than before the load: {status} {body[:200]}")

    def run(self):
        first = json.loads(self.server.ask("POST", "/v1/completions", QUESTION)[1])["choices"]
        threads = [threading.Thread(target=t, args=a) for t, a in
                   [(self.load, ()), (self.watch_health, ()), (self.ask_again, (first,))]
                   + [(Rude(self.server, i, self.ends, self.counts).run, ()) for i in range(self.flags.rude)]]
        idle = []
        for thread in threads:
            thread.start()
        begun, samples = time.monotonic(), []
        lines = open(self.flags.output, "w") if self.flags.output else None
        while time.monotonic() - begun < 60 * self.flags.minutes and self.server.process.poll() is None:
            time.sleep(self.flags.every)
            # The server lets go of an idle connection after 75 s; here the oldest go first.
            for s in idle[:self.flags.idle // 4]:
                s.close()
            idle = idle[self.flags.idle // 4:]
            while len(idle) < self.flags.idle:
                idle.append(self.server.connect())
            samples.append((time.monotonic() - begun, self.server.kilobytes()))
            line = json.dumps({"seconds": round(samples[-1][0]), "rss_mb": round(samples[-1][1] / 1024, 1),
                               "requests": self.asked, "failed": self.failed, "tokens": self.tokens,
                               "free_blocks": self.server.metric("fathom_kv_cache_free_blocks"),
                               "running": self.server.metric("fathom_requests_running"),
                               "connections": self.server.metric("fathom_http_connections"), "faults": len(self.faults)})
            print(line, flush=True)
            if lines:
                print(line, file=lines, flush=True)
        self.ends.set()
        for thread in threads:
            thread.join()
        for s in idle:
            s.close()
        return self.judge(samples)

    def judge(self, samples):
        third = samples[len(samples) // 3][1]
        grown = max(kb for _, kb in samples[len(samples) // 3:]) / third - 1
        if grown > 0.1:
            self.faults.append(f"memory grew by {100 * grown:.0f} % after the first third")
        for _ in range(600):
            if self.server.metric("fathom_kv_cache_free_blocks") == self.server.metric("fathom_kv_cache_blocks"):
                break
            time.sleep(0.1)
        else:
            self.faults.append("blocks are missing")
        if self.failed:
            self.faults.append(f"{self.failed} requests failed")
        self.server.process.terminate()
        if self.server.process.wait() != 0:
            self.faults.append(f"the server ended with status {self.server.process.returncode}")
        print(json.dumps({"minutes": self.flags.minutes, "requests": self.asked, "tokens": self.tokens,
                          "rude": self.counts, "rss_mb_after_a_third": round(third / 1024, 1),
                          "rss_mb_most_after": round(max(kb for _, kb in samples[len(samples) // 3:]) / 1024, 1),
                          "faults": self.faults[:20]}))
        return 1 if self.faults else 0


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("fathom")
    p.add_argument("model")
    p.add_argument("--data", required=True, help="token store of the model's tokenizer")
    p.add_argument("--minutes", type=float, default=10)
    p.add_argument("--clients", type=int, default=64)
    p.add_argument("--rude", type=int, default=12, help="clients that do what they should not")
    p.add_argument("--idle", type=int, default=500, help="connections that say nothing")
    p.add_argument("--every", type=float, default=10, help="seconds between two samples")
    p.add_argument("--server", default="", help="further flags of fathom serve")
    p.add_argument("-o", "--output", help="the samples, in a file too")
    flags = p.parse_args()
    server = Server(flags)
    try:
        sys.exit(Soak(flags, server).run())
    finally:
        server.process.kill()


if __name__ == "__main__":
    main()
