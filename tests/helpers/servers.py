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


class Bucket(http.server.ThreadingHTTPServer):
    """Serves ``files`` as Google's store does, but for what ``faults`` says, one entry a request.

    A fault is a dict: ``drop`` (bytes after which the connection breaks), ``status``, ``ignore_range``,
    ``corrupt`` (position of a byte that is changed), ``headers`` (to replace or, if None, leave out),
    ``slow`` (seconds between the pieces), ``replace`` (new content of the file from this request on),
    ``split`` (headers of several values are sent in as many lines, as the store does), ``wait`` (seconds before the
    answer), ``trickle`` (seconds between the first bytes of the answer's headers).
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
        time.sleep(fault.get("wait", 0))
        for i in range(20 if "trickle" in fault else 0):
            try:
                self.wfile.write(b"HTTP/1.0 200 OK\r\nX-More: ...\r\n"[i : i + 1])
            except OSError:
                return
            time.sleep(fault["trickle"])
        content = server.files.get(self.path)
        if content is None or fault.get("status"):
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


class Hub(http.server.ThreadingHTTPServer):
    """Serves ``repositories`` ("owner/name" to file names to contents) as the Hugging Face hub does.

    Files are redirected to where their bytes are (another host by its name), with the sha256 as ETag.  ``faults`` are
    of the requests for bytes, one entry each, and ``every`` of all of these: ``drop`` and ``corrupt`` as of ``Bucket``,
    ``refuse`` (a status).  ``status`` answers every request, ``etag`` is sent in place of the sha256.  ``requests`` has
    every request's method and path.
    """

    daemon_threads = True
    COMMIT = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.repositories, self.faults, self.every, self.requests = {}, [], {}, []
        self.status, self.etag = None, None
        self.url = f"http://127.0.0.1:{self.server_port}"

    def add(self, repository, file, content):
        self.repositories.setdefault(repository, {})[file] = content

    def bytes_sent(self):
        """How often somebody asked for a file's bytes."""
        return sum(path.startswith("/bytes/") for _, path in self.requests)


class HubHandler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def answer(self, status, headers, body=b""):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(OSError):
                self.wfile.write(body)

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
        server = self.server
        fault = {**server.every, **(server.faults.pop(0) if server.faults else {})}
        if "refuse" in fault:
            return self.answer(fault["refuse"], {})
        contents = [content for files in server.repositories.values() for content in files.values()]
        content = bytearray(next(x for x in contents if hashlib.sha256(x).hexdigest() == sha))
        if "corrupt" in fault:
            content[fault["corrupt"]] ^= 1
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted else 0
        body = bytes(content[start:])
        ranges = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        headers = {"ETag": f'"{sha}"', "Content-Length": str(len(body))} | ranges
        self.answer(206 if start else 200, headers, body[: fault.get("drop", len(body))])
        if "drop" in fault:
            self.close_connection = True


class RefusingProxy(http.server.ThreadingHTTPServer):
    """A proxy that lets nobody through, as those of companies do; ``requests`` has what it was asked for."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), RefusingHandler)
        self.requests = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class RefusingHandler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_CONNECT(self):
        self.server.requests.append(self.path)
        self.send_error(403)
