"""Loopback stand-ins of Google's bucket and of the Hugging Face hub, which behave as badly as the network does."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import io
import json
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


class Server(http.server.ThreadingHTTPServer):
    """A server that lists its ``requests``; ``faults`` are of one request each, ``every`` of all of them."""

    daemon_threads = True
    handler: type[http.server.BaseHTTPRequestHandler]

    def __init__(self):
        super().__init__(("127.0.0.1", 0), self.handler)
        self.requests, self.faults, self.every = [], [], {}
        self.url = f"http://127.0.0.1:{self.server_port}"

    def fault(self):
        return {**self.every, **(self.faults.pop(0) if self.faults else {})}


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def answer(self, status, headers, body=b"", pause=0.0):
        """Sends an answer, its body in pieces; headers may be lists, for as many lines, or None for none."""
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            for line in value if isinstance(value, list) else [value] * (value is not None):
                self.send_header(name, line)
        self.end_headers()
        with contextlib.suppress(OSError):  # the client has gone
            for at in range(0, len(body), 10_000) if self.command != "HEAD" else ():
                self.wfile.write(body[at : at + 10_000])
                time.sleep(pause)

    def part(self, content, fault):
        """The status, headers and bytes of what is asked for of a file, as a fault changes it."""
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        body = bytearray(content)
        if "corrupt" in fault:
            body[fault["corrupt"]] ^= 1
        size = {"Content-Length": str(len(content) - start)}
        ranges = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        return 206 if start else 200, size | ranges, bytes(body[start:])[: fault.get("drop", len(content))]


class BucketHandler(Handler):
    def do_GET(self):
        server = self.server
        fault = server.fault()
        server.requests.append(self.headers.get("Range"))
        if "replace" in fault:
            server.files[self.path] = fault["replace"]
        time.sleep(fault.get("wait", 0))
        for byte in b"HTTP/1.0 200 OK\r\nX-More: " if "trickle" in fault else b"":
            try:
                self.wfile.write(bytes([byte]))
            except OSError:
                return
            time.sleep(fault["trickle"])
        content = server.files.get(self.path)
        if content is None or fault.get("status"):
            self.send_error(fault.get("status", 404))
            return
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        if self.headers.get("If-Range") not in (None, etag) and not fault.get("ignore_if_range"):
            del self.headers["Range"]
        status, headers, body = self.part(content, fault)
        if status == 206 and int(headers["Content-Length"]) <= 0:
            self.send_error(416)
            return
        md5 = base64.b64encode(hashlib.md5(content).digest()).decode()
        headers |= {"ETag": etag, "x-goog-hash": ["crc32c=AAAAAA==", f"md5={md5}"], **fault.get("headers", {})}
        self.answer(status, headers, body, fault.get("slow", 0))


class Bucket(Server):
    """Serves ``files`` as Google's store does, but for the faults; ``requests`` has the ranges that were asked for.

    A fault is a dict: ``drop`` (bytes after which the connection breaks), ``status``, ``ignore_if_range``,
    ``corrupt`` (position of a byte that is changed), ``headers`` (to replace or, if None, leave out),
    ``slow`` (seconds between the pieces), ``replace`` (new content of the file from this request on), ``wait`` (seconds
    before the answer), ``trickle`` (seconds between the first bytes of the answer's headers).
    """

    handler = BucketHandler

    def __init__(self):
        super().__init__()
        self.files = {}


class HubHandler(Handler):
    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        server = self.server
        server.requests.append((self.command, self.path))
        if server.status is not None:
            return self.answer(server.status, {})
        if self.path.startswith("/bytes/"):
            return self.send_bytes(self.path.removeprefix("/bytes/"))
        if self.path.startswith("/api/models/"):
            return self.send_tree(self.path.removeprefix("/api/models/"))
        repository, _, rest = self.path.removeprefix("/").partition("/resolve/")
        if repository not in server.repositories:
            return self.answer(401, {"X-Error-Code": "RepoNotFound"})
        commit = {"X-Repo-Commit": server.COMMIT}
        content = server.repositories[repository].get(rest.partition("/")[2])
        if content is None:
            return self.answer(404, commit | {"X-Error-Code": "EntryNotFound"})
        sha = hashlib.sha256(content).hexdigest()
        linked = {"X-Linked-Etag": f'"{server.etag or sha}"', "X-Linked-Size": str(len(content))}
        return self.answer(302, commit | linked | {"Location": f"http://localhost:{server.server_port}/bytes/{sha}"})

    def send_tree(self, path):
        files = self.server.repositories.get(path.partition("/tree/")[0], {})
        entries = [
            {"type": "file", "path": name, "size": len(content), "oid": "0" * 40,
             "lfs": {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}}
            for name, content in files.items()
        ]  # fmt: skip
        self.answer(200, {"Content-Type": "application/json"}, json.dumps(entries).encode())

    def send_bytes(self, sha):
        fault = self.server.fault()
        if "refuse" in fault:
            return self.answer(fault["refuse"], {})
        contents = [content for files in self.server.repositories.values() for content in files.values()]
        content = next(x for x in contents if hashlib.sha256(x).hexdigest() == sha)
        status, headers, body = self.part(content, fault)
        self.answer(status, {"ETag": f'"{sha}"', **headers}, body)
        self.close_connection = "drop" in fault


class Hub(Server):
    """Serves ``repositories`` ("owner/name" to file names to contents) as the Hugging Face hub does.

    Files are redirected to where their bytes are (another host by its name), with the sha256 as ETag.  The faults are
    of the requests for bytes: ``drop`` and ``corrupt`` as of ``Bucket``, ``refuse`` (a status).  ``status`` answers
    every request, ``etag`` is sent in place of the sha256.  ``requests`` has every request's method and path.
    """

    handler = HubHandler
    COMMIT = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self):
        super().__init__()
        self.repositories, self.status, self.etag = {}, None, None

    def add(self, repository, file, content):
        self.repositories.setdefault(repository, {})[file] = content

    def bytes_sent(self):
        """Counts the requests for a file's bytes."""
        return sum(path.startswith("/bytes/") for _, path in self.requests)


class RefusingHandler(Handler):
    def do_CONNECT(self):
        self.server.requests.append(self.path)
        self.send_error(403)


class RefusingProxy(Server):
    """A proxy that lets nobody through, as those of companies do; ``requests`` has what it was asked for."""

    handler = RefusingHandler
