"""The gate of a server of the local stack, `python -m deploy.local.gate HOME APP PORT`: who is let in, and from where.

A server that listens on the loopback interface is asked by every user of the machine, and by every page in a browser:
another site's by a name of its own that leads here (DNS rebinding), or across origins. So each request, and each
websocket before it opens, must name this server as its host, come from its own pages or from no page, and bring the
password of `HOME/auth`. A browser asks for it once, and sends it to this port only, which a cookie is not bound to.
"""

import hmac
import os
import sys
from pathlib import Path

import uvicorn
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.importer import import_from_string

from deploy.local.access import ENTRANCE, Access, access_file, is_open, read_access
from deploy.local.port import HOST


class Gate:
    """An ASGI app before another one; `access` None asks for no password, and looks at host and origin all the same."""

    def __init__(self, app: ASGIApp, *, port: int, access: Access | None) -> None:
        self._app = app
        self._host = f"{HOST}:{port}"
        self._own = f"http://{self._host}"
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand a request on, or answer it."""
        answer = None if scope["type"] == "lifespan" else self._answer(scope)
        await (answer or self._app)(scope, receive, send)

    def _answer(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        if headers.getlist("host") != [self._host]:
            return PlainTextResponse(f"This is {self._own} and answers to no other name.\n", 403)
        if any(origin != self._own for origin in headers.getlist("origin")) or _is_from_elsewhere(scope, headers):
            return PlainTextResponse(f"This is {self._own} and answers pages of its own only.\n", 403)
        if not self._lets_in(headers.get("authorization", "")):
            ask = {"WWW-Authenticate": 'Basic realm="relex", charset="UTF-8"'}
            return PlainTextResponse("The file auth of the stack's home has user and password.\n", 401, ask)
        if scope["path"] == ENTRANCE:
            # From an address with a password in it to one without: a page at the former can fetch nothing.
            return RedirectResponse(f"{self._own}/", 303)
        return None

    def _lets_in(self, authorization: str) -> bool:
        access = self._access
        return access is None or hmac.compare_digest(authorization.encode(), access.authorization.encode())


def _is_from_elsewhere(scope: Scope, headers: Headers) -> bool:
    """Return whether a browser says that another site's page asks; a link of it may be followed."""
    if headers.get("sec-fetch-site") not in ("cross-site", "same-site"):
        return False
    # What comes without an origin: images, frames, links.
    link = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
    return not (link and scope["type"] == "http" and scope["method"] == "GET")


def main() -> None:
    """Serve the app that the factory APP makes, until it is stopped."""
    home, app, port = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    # Databases, logs and whatever else the server writes.
    os.umask(0o077)
    access = read_access(home)
    if access is None and not is_open(home):
        sys.exit(f"{access_file(home)} is not there. Run `relex up`, which makes it.")
    uvicorn.run(
        Gate(import_from_string(app)(), port=port, access=access),
        host=HOST,
        port=port,
        log_level="warning",
        access_log=False,
        # Nobody stands between, and what a client says of itself is not believed.
        proxy_headers=False,
    )


if __name__ == "__main__":
    main()
