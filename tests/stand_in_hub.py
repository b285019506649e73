"""A server on this machine that answers huggingface_hub as the Hub does, for one repository made of a folder."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class StandIn:
    """``fetched``: the files that were sent, in order, each as often as it was sent."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.url = ""
        self.fetched: list[str] = []
        self.asked = 0  # requests of any kind

    def be_the_hub(self, monkeypatch: Any, cache: Path) -> None:
        """What HF_ENDPOINT and HF_HUB_CACHE do in a process that starts with them."""
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", self.url)
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))

    def files(self) -> list[str]:
        return sorted(str(file.relative_to(self.folder)) for file in self.folder.rglob("*") if file.is_file())

    def listing(self) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": name, "size": (self.folder / name).stat().st_size, "oid": self.etag(name)}
            for name in self.files()
        ]

    def etag(self, name: str) -> str:
        return hashlib.sha1((self.folder / name).read_bytes()).hexdigest()


@contextmanager
def stand_in(name: str, folder: Path) -> Iterator[StandIn]:
    hub = StandIn(name, folder)

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(True)

        def do_HEAD(self) -> None:
            self._answer(False)

        def _answer(self, with_body: bool) -> None:
            hub.asked += 1
            path = unquote(self.path.partition("?")[0])
            api = f"/api/models/{hub.name}"
            if path in (api, f"{api}/revision/main"):
                siblings = [{"rfilename": each} for each in hub.files()]
                self._send(json.dumps({"id": hub.name, "sha": COMMIT, "siblings": siblings}).encode())
            elif path.startswith(f"{api}/tree/"):
                self._send(json.dumps(hub.listing()).encode())
            elif path.startswith(f"/{hub.name}/resolve/"):
                file = path.split("/resolve/")[1].partition("/")[2]
                if with_body:
                    hub.fetched.append(file)
                self._send((hub.folder / file).read_bytes(), with_body, {"ETag": f'"{hub.etag(file)}"'})
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()

        def _send(self, body: bytes, with_body: bool = True, headers: dict[str, str] | None = None) -> None:
            self.send_response(200)
            for key, value in {"X-Repo-Commit": COMMIT, "Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
