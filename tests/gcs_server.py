"""Google Cloud Storage's JSON API with buckets in memory, as much as gcsfs, TensorStore and Orbax call.

    with running("bucket") as store: ...  # the environment says to all three where it is, and so to child processes

Written from Google's reference of the API (https://cloud.google.com/storage/docs/json_api/v1), not from the clients.
Like the real one it has no folders, puts an object whole or not at all, and lists what was put at once.
"""

import base64
import contextlib
import json
import os
import re
import threading
import zlib
from collections.abc import Iterator
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest import mock
from urllib.parse import parse_qs, unquote, urlsplit

ENVIRONMENT = {"GOOGLE_AUTH_TOKEN_FOR_TESTING": "none", "GOOGLE_CLOUD_PROJECT": "test", "NO_GCE_CHECK": "true"}
ENVIRONMENT |= {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}  # asks a service of its own, by gRPC


class Store:
    """Objects by (bucket, name), each (generation, bytes); ``refuse``: "METHOD /path" patterns answered with 403."""

    def __init__(self, *buckets: str):
        self.buckets = set(buckets)
        self.objects: dict[tuple[str, str], tuple[int, bytes]] = {}
        self.uploads: dict[str, tuple[str, str, bytearray]] = {}
        self.refuse: list[str] = []
        self.requests: list[str] = []
        self.generation = 1_000_000
        self.lock = threading.RLock()

    def names(self, bucket: str) -> list[str]:
        with self.lock:
            return sorted(name for b, name in self.objects if b == bucket)

    def put(self, bucket: str, name: str, content: bytes, only_at: str | None = None) -> int | None:
        """The new generation; None where ``only_at`` is not the present one (0: there is none)."""
        with self.lock:
            if only_at is not None and self.objects.get((bucket, name), (0,))[0] != int(only_at):
                return None
            self.generation += 1
            self.objects[bucket, name] = self.generation, content
            return self.generation


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_) -> None:
        pass  # a client that hangs up while it is answered: they all do when they close


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: Store

    def log_message(self, *_) -> None:
        pass

    def answer(self, code: int, body: dict | bytes = b"", **headers: str) -> None:
        raw = json.dumps(body).encode() if isinstance(body, dict) else body
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Type", "application/json" if isinstance(body, dict) else "application/octet-stream")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def refuse(self, code: int, reason: str) -> None:
        self.answer(code, {"error": {"code": code, "message": reason, "errors": [{"reason": reason}]}})

    def do(self) -> None:
        parts = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        request = f"{self.command} {unquote(parts.path)}"
        self.store.requests.append(request)
        if any(re.search(pattern, request) for pattern in self.store.refuse):
            return self.refuse(403, "Forbidden")
        path = re.sub(r"^(/upload|/download)?/storage/v1/b/", "", parts.path)
        bucket, _, rest = path.partition("/")
        bucket = unquote(bucket)
        if bucket not in self.store.buckets:
            return self.refuse(404, "The specified bucket does not exist.")
        if not rest:
            return self.answer(200, {"kind": "storage#bucket", "id": bucket, "name": bucket, "location": "US"})
        if parts.path.startswith("/upload/"):
            return self.upload(bucket, query, body)
        if copy := re.match(r"o/([^/]+)/rewriteTo/b/([^/]+)/o/([^/]+)$", rest):
            return self.copy(bucket, *map(unquote, copy.groups()))
        if move := re.match(r"o/([^/]+)/moveTo/o/([^/]+)$", rest):
            return self.move(bucket, *map(unquote, move.groups()))
        if rest.rstrip("/") == "o":
            return self.list(bucket, query)
        self.one(bucket, unquote(rest.removeprefix("o/")), query)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do

    def describe(self, bucket: str, name: str) -> dict:
        generation, content = self.store.objects[bucket, name]
        crc = base64.b64encode(zlib.crc32(content).to_bytes(4, "big")).decode()  # an ETag's worth: nobody compares it
        return {
            "kind": "storage#object", "name": name, "bucket": bucket, "size": str(len(content)), "etag": crc,
            "generation": str(generation), "metageneration": "1", "contentType": "application/octet-stream",
            "timeCreated": "2026-01-01T00:00:00.000Z", "updated": f"2026-01-01T00:00:00.{generation % 1000:03d}Z",
        }  # fmt: skip

    def list(self, bucket: str, query: dict) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        items, prefixes = [], set()
        with self.store.lock:
            for name in self.store.names(bucket):
                if not name.startswith(prefix) or name < query.get("startOffset", ""):
                    continue
                if "endOffset" in query and name >= query["endOffset"]:
                    continue
                head, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
                if found:
                    prefixes.add(prefix + head + delimiter)
                else:
                    items.append(self.describe(bucket, name))
        self.answer(200, {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)})

    def one(self, bucket: str, name: str, query: dict) -> None:
        with self.store.lock:
            generation, content = self.store.objects.get((bucket, name), (0, b""))
            if not generation:
                return self.refuse(404, f"No such object: {bucket}/{name}")
            if query.get("ifGenerationMatch", str(generation)) != str(generation):
                return self.refuse(412, "conditionNotMet")
            if query.get("ifGenerationNotMatch") == str(generation):
                return self.answer(304)
            if self.command == "DELETE":
                del self.store.objects[bucket, name]
                return self.answer(204)
            described = self.describe(bucket, name)
        if query.get("alt") != "media":
            return self.answer(200, described)
        headers = {"x_goog_generation": str(generation)}
        if wanted := re.match(r"bytes=(\d*)-(\d*)$", self.headers.get("Range", "")):
            size = len(content)
            first = int(wanted[1]) if wanted[1] else size - int(wanted[2])
            last = min(int(wanted[2]), size - 1) if wanted[1] and wanted[2] else size - 1
            if first >= size:
                return self.refuse(416, "Requested range not satisfiable")
            headers["Content_Range"] = f"bytes {first}-{last}/{size}"
            return self.answer(206, content[first : last + 1], **headers)
        self.answer(200, content, **headers)

    def upload(self, bucket: str, query: dict, body: bytes) -> None:
        kind = query["uploadType"]
        if kind == "resumable":
            return self.resume(bucket, query, body)
        name = query.get("name")
        if kind == "multipart":
            mail = message_from_bytes(b"Content-Type: " + self.headers["Content-Type"].encode() + b"\r\n\r\n" + body)
            about, _ = mail.get_payload()
            name = json.loads(about.get_payload(decode=True))["name"]
            boundary = mail.get_boundary().encode()  # the content itself, byte for byte
            body = body.split(b"--" + boundary)[2].partition(b"\n\r\n" if b"\n\r\n" in body else b"\n\n")[2]
            body = body.removesuffix(b"\n").removesuffix(b"\r")
        self.stored(bucket, name, body, query)

    def resume(self, bucket: str, query: dict, body: bytes) -> None:
        if "upload_id" not in query:
            name = query.get("name") or json.loads(body)["name"]
            upload = str(len(self.store.uploads))
            self.store.uploads[upload] = bucket, name, bytearray()
            host = self.headers["Host"]
            where = f"http://{host}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={upload}"
            return self.answer(200, {}, Location=where)
        bucket, name, so_far = self.store.uploads[query["upload_id"]]
        so_far += body
        if self.headers["Content-Range"].endswith("/*"):
            return self.answer(308, b"", Range=f"bytes=0-{len(so_far) - 1}")
        self.stored(bucket, name, bytes(so_far), query)

    def stored(self, bucket: str, name: str, content: bytes, query: dict) -> None:
        if self.store.put(bucket, name, content, query.get("ifGenerationMatch")) is None:
            return self.refuse(412, "conditionNotMet")
        self.answer(200, self.describe(bucket, name))

    def copy(self, bucket: str, name: str, to_bucket: str, to_name: str) -> None:
        with self.store.lock:
            if (bucket, name) not in self.store.objects:
                return self.refuse(404, f"No such object: {bucket}/{name}")
            self.store.put(to_bucket, to_name, self.store.objects[bucket, name][1])
            described = self.describe(to_bucket, to_name)
        size = described["size"]
        done = {"done": True, "totalBytesRewritten": size, "objectSize": size, "resource": described}
        self.answer(200, {"kind": "storage#rewriteResponse", **done})

    def move(self, bucket: str, name: str, to_name: str) -> None:
        with self.store.lock:
            if (bucket, name) not in self.store.objects:
                return self.refuse(404, f"No such object: {bucket}/{name}")
            self.store.put(bucket, to_name, self.store.objects.pop((bucket, name))[1])
            self.answer(200, self.describe(bucket, to_name))


@contextlib.contextmanager
def running(*buckets: str) -> Iterator[Store]:
    """While it lasts the clients of this process, and of those it starts, find ``buckets`` here."""
    store = Store(*buckets)
    handler = type("BoundHandler", (Handler,), {"store": store})
    with Server(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        environment = {**ENVIRONMENT, "STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url}
        try:
            with mock.patch.dict(os.environ, environment):
                yield store
        finally:
            server.shutdown()
            thread.join()
