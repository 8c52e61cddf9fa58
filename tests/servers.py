"""Loopback stand-ins of Google's bucket and of the Hugging Face hub, which behave as badly as the network does."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import io
import re
import threading
import time

import numpy as np


@contextlib.contextmanager
def serving(server):
    """Lets a server answer while the block runs."""
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def make_content(seed, size=25_000):
    """An .npz of about 100 kB."""
    f = io.BytesIO()
    np.savez(f, cls=np.random.default_rng(seed).standard_normal(size, dtype=np.float32))
    return f.getvalue()


class Bucket(http.server.ThreadingHTTPServer):
    """Serves ``files`` as Google's store does, but for what ``faults`` says, one entry a request.

    A fault is a dict: ``drop`` (bytes after which the connection breaks), ``status``, ``ignore_range``,
    ``corrupt`` (position of a byte that is changed), ``headers`` (to replace or, if None, leave out),
    ``slow`` (seconds between the pieces), ``replace`` (new content of the file from this request on),
    ``split`` (headers of several values are sent in as many lines, as the store does).
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.every, self.requests = {}, [], {}, []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server = self.server
        fault = {**server.every, **(server.faults.pop(0) if server.faults else {})}
        server.requests.append(self.headers.get("Range"))
        if "replace" in fault:
            server.files[self.path] = fault["replace"]
        content = server.files.get(self.path)
        if content is None or "status" in fault:
            self.send_error(fault.get("status", 404))
            return
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        start = 0
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        unchanged = self.headers.get("If-Range") in (None, etag) or fault.get("ignore_if_range")
        if wanted and unchanged and not fault.get("ignore_range"):
            start = int(wanted[1])
            if start >= len(content):
                self.send_error(416)
                return
        body = bytearray(content[start:])
        if "corrupt" in fault:
            body[fault["corrupt"]] ^= 1
        md5 = base64.b64encode(hashlib.md5(content).digest()).decode()
        headers = {
            "Content-Length": str(len(body)),
            "ETag": etag,
            "x-goog-generation": str(len(content)),
            "x-goog-hash": f"crc32c=AAAAAA==,md5={md5}",
            "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}" if start else None,
            **fault.get("headers", {}),
        }
        self.send_response(206 if start else 200)
        for name, value in headers.items():
            if value is None:
                continue
            for line in value.split(",") if fault.get("split") else [value]:
                self.send_header(name, line)
        self.end_headers()
        self.send(body[: fault.get("drop", len(body))], fault.get("slow", 0))

    def send(self, body, pause):
        try:
            for at in range(0, len(body), 10_000):
                self.wfile.write(body[at : at + 10_000])
                time.sleep(pause)
        except OSError:  # the client has gone
            self.close_connection = True
