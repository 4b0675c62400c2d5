"""A proxy before an S3 endpoint that breaks chosen requests. The Host header is kept, so signatures still hold.

usage: faultproxy.py PORT UPSTREAM_PORT    prints "ready"; GET or POST /__faults reads or replaces the rules (JSON)

A rule: {"match": regex of "METHOD PATH", "kind": KIND, "times": how often, "prob": how likely, "after": bytes of the
body that still pass, "ms": delay}. Kinds: slowdown (503), error500, latency, reset (before the answer), reset_upload,
lost_response (done upstream, never told), reset_body, truncate (body cut in good order) and corrupt (one bit).
"""

import asyncio
import json
import random
import re
import socket
import struct
import sys

ERRORS = {"slowdown": (503, "SlowDown"), "error500": (500, "InternalError")}
BLOCK = 65_536


class Rules:
    """The rules in force, and a log of what they did."""

    def __init__(self):
        self.rules, self.log, self.random = [], [], random.Random(0)

    def pick(self, line):
        """The faults for a request, by kind."""
        picked = {}
        for rule in self.rules:
            left = rule.get("times", 1)
            if left > 0 and re.match(rule["match"], line) and self.random.random() < rule.get("prob", 1.0):
                if "times" in rule:
                    rule["times"] -= 1
                picked[rule["kind"]] = rule
                self.log.append([line, rule["kind"]])
        return picked


async def read_head(reader):
    raw = await reader.readuntil(b"\r\n\r\n")
    first, *lines = raw.decode("latin1").rstrip().split("\r\n")
    return (
        raw,
        first,
        {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)},
    )


async def body(reader, headers, none=False):
    if none:
        return
    if "chunked" in headers.get("transfer-encoding", "").lower():
        size = 1
        while size:
            line = await reader.readline()
            size = int(line.split(b";")[0], 16)
            yield line + await reader.readexactly(size + 2)
        return
    left = int(headers.get("content-length", 0))
    while left:
        data = await reader.read(min(left, BLOCK))
        if not data:
            raise ConnectionError
        left -= len(data)
        yield data


def reset(writer):
    """Close with a TCP reset."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


class Exchange:
    """One client's connection and the one upstream that belongs to it."""

    def __init__(self, rules, upstream, reader, writer):
        self.rules, self.port, self.reader, self.writer = rules, upstream, reader, writer
        self.up = None

    async def serve(self):
        try:
            while await self.request():
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            for writer in (self.writer, self.up and self.up[1]):
                if writer and not writer.is_closing():
                    writer.close()

    async def request(self):
        """Serve one request; whether the connection goes on."""
        raw, first, headers = await read_head(self.reader)
        method, path, _ = first.split(" ", 2)
        if path == "/__faults":
            return await self.control(method, headers)
        faults = self.rules.pick(f"{method} {path}")
        await asyncio.sleep(faults.get("latency", {}).get("ms", 0) / 1000)
        if "reset" in faults:
            return reset(self.writer)
        if headers.get("expect", "").lower() == "100-continue":
            self.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            raw = re.sub(rb"(?i)\r\nexpect:[^\r]*", b"", raw)
        for kind, (status, name) in ERRORS.items():
            if kind in faults:
                return await self.refuse(method, headers, status, name)
        return await self.forward(method, raw, headers, faults)

    async def control(self, method, headers):
        data = b"".join([part async for part in body(self.reader, headers)])
        if method == "POST":
            self.rules.rules = json.loads(data)
            self.rules.log.clear()
        text = json.dumps({"rules": self.rules.rules, "log": self.rules.log}).encode()
        self.writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(text) + text)
        await self.writer.drain()
        return True

    async def refuse(self, method, headers, status, name):
        async for _ in body(self.reader, headers):
            pass
        text = f"<?xml version='1.0'?><Error><Code>{name}</Code><Message>injected</Message></Error>".encode()
        head = f"HTTP/1.1 {status} {name}\r\nContent-Type: application/xml\r\nContent-Length: {len(text)}\r\n\r\n"
        self.writer.write(head.encode() + (b"" if method == "HEAD" else text))
        await self.writer.drain()
        return True

    async def forward(self, method, raw, headers, faults):
        if self.up is None or self.up[1].is_closing():
            self.up = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 20)
        reader, writer = self.up
        writer.write(raw)
        async for data in body(self.reader, headers):
            if "reset_upload" in faults:
                writer.transport.abort()
                return reset(self.writer)
            writer.write(data)
            await writer.drain()
        raw, first, headers = await read_head(reader)
        if "lost_response" in faults:
            writer.transport.abort()
            return reset(self.writer)
        self.writer.write(raw)
        nothing = method == "HEAD" or int(first.split()[1]) in (204, 304)
        return await self.answer(body(reader, headers, nothing), faults) and headers.get("connection") != "close"

    async def answer(self, parts, faults):
        cut = faults.get("reset_body") or faults.get("truncate")
        sent = 0
        async for data in parts:
            if "corrupt" in faults and not sent:
                data = bytes([data[0] ^ 1]) + data[1:]
            if cut and sent + len(data) > cut.get("after", 0):
                self.writer.write(data[: max(0, cut.get("after", 0) - sent)])
                await self.writer.drain()
                self.up[1].transport.abort()
                return reset(self.writer) if "reset_body" in faults else self.writer.close()
            sent += len(data)
            self.writer.write(data)
            await self.writer.drain()
        await self.writer.drain()
        return True


async def main(port, upstream):
    rules = Rules()

    async def connected(reader, writer):
        await Exchange(rules, upstream, reader, writer).serve()

    server = await asyncio.start_server(connected, "127.0.0.1", port, limit=1 << 20)
    print("ready", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2])))
