"""gcp-storage-emulator as a process of its own: `bucket_emulator.py BUCKET PORT_FILE`.

What real buckets have and the emulator lacks is added here: preconditions on the generation of an
object, the header that names it, several requests at once, and, for the tests, times at which
requests fail. It has no credentials and no permissions.
"""

import contextlib
import pathlib
import re
import sys
import threading
import urllib.parse
from functools import partial
from http import server

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage


class Handler(RequestHandler):
    """Adds what the emulator lacks. `POST /fail?code=503` makes requests fail, `code=0` ends it;
    with `match=TEXT` only those whose URL has the text in it, with `method=GET` only those."""

    failing = {"code": 0}
    one_at_a_time = threading.Lock()

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except (BrokenPipeError, ConnectionResetError):  # the client was killed
            self.close_connection = True

    def parse_request(self):
        if not super().parse_request():
            return False
        url = urllib.parse.urlparse(self.path)
        query = {k: v[0] for k, v in urllib.parse.parse_qs(url.query).items()}
        if url.path == "/fail":
            Handler.failing = query | {"code": int(query["code"])}
            return self._refuse(200)
        failing = Handler.failing
        if (
            failing["code"]
            and failing.get("match", "") in urllib.parse.unquote(self.path)
            and failing.get("method", self.command) == self.command
        ):
            return self._refuse(failing["code"])
        self.one_at_a_time.acquire()
        self.holds = True
        if "ifGenerationMatch" in query and not self._matches(url, query):
            return self._refuse(412)
        return True

    def end_headers(self):
        found = re.fullmatch(r".*/b/([^/]+)/o/(.*)", urllib.parse.urlparse(self.path).path)
        if self.command == "GET" and found and "alt=media" in self.path:
            with contextlib.suppress(NotFound):
                name = urllib.parse.unquote(found[2])
                generation = self.storage.get_file_obj(found[1], name)["generation"]
                self.send_header("x-goog-generation", generation)
        super().end_headers()

    def finish(self):
        super().finish()
        if getattr(self, "holds", False):
            self.one_at_a_time.release()

    def _refuse(self, code):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(code)
        self.send_header("Content-Length", "0")
        self.end_headers()
        return False

    def _matches(self, url, query):
        found = re.fullmatch(r".*/b/([^/]+)/o(?:/(.*))?", url.path)
        name = urllib.parse.unquote(found[2] or query.get("name", ""))
        if not name:  # of an upload in one request; its body names the object
            self.body = self.rfile.read(int(self.headers["Content-Length"]))
            name = re.search(rb'"name": "([^"]+)"', self.body)[1].decode()
            self.rfile = _Replayed(self.body, self.rfile)
        try:
            generation = self.storage.get_file_obj(found[1], name)["generation"]
        except NotFound:
            generation = "0"
        return generation == query["ifGenerationMatch"]

    def log_message(self, format, *args):
        pass


class _Replayed:
    """A request's stream whose body was read before."""

    def __init__(self, body, stream):
        self._body, self._stream = body, stream

    def read(self, size):
        return self._body[:size]

    def __getattr__(self, name):
        return getattr(self._stream, name)


def main(bucket, port_file):
    storage = Storage(use_memory_fs=True)
    buckets.create_bucket(bucket, storage)
    httpd = server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, storage))
    pathlib.Path(port_file).write_text(f"{httpd.server_port}\n")
    httpd.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
