"""The page at the service's root: files of this package, which ask the API as any client does."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import fastapi
from starlette.exceptions import HTTPException

_FOLDER = Path(__file__).with_name("page")
_INDEX = "index.html"
_TYPES = {
    ".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}  # fmt: skip
# The page loads its own files and pictures that it holds in memory, and calls this service, nothing else.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}  # fmt: skip


@dataclass(frozen=True)
class PageFile:
    """A file of the page, and the tag by which a browser asks whether its copy is still the same."""

    data: bytes
    media_type: str
    tag: str


def read_page() -> dict[str, PageFile]:
    """The files of the page by name. Raises OSError where they were not installed."""
    return {path.name: _read(path) for path in sorted(_FOLDER.iterdir()) if path.suffix in _TYPES}


def add_page(api: fastapi.FastAPI) -> None:
    """Serve the page at / and its parts at /page/NAME, open to everybody: they hold no secret and no picture."""
    files = read_page()

    @api.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page(request: fastapi.Request) -> fastapi.Response:
        """The page."""
        return _answer(files[_INDEX], request)

    @api.api_route("/page/{name}", methods=["GET", "HEAD"], include_in_schema=False)
    async def part(request: fastapi.Request, name: str) -> fastapi.Response:
        """A part of the page."""
        if name not in files:
            raise HTTPException(404, f"no file {name!r} of the page; it begins at /")
        return _answer(files[name], request)


def _read(path: Path) -> PageFile:
    data = path.read_bytes()
    return PageFile(data, _TYPES[path.suffix], f'"{hashlib.sha256(data).hexdigest()[:32]}"')


def _answer(file: PageFile, request: fastapi.Request) -> fastapi.Response:
    """The file, or word that the browser's copy of it is the same."""
    headers = {**_HEADERS, "ETag": file.tag}
    if request.headers.get("if-none-match") == file.tag:
        return fastapi.Response(status_code=304, headers=headers)
    return fastapi.Response(file.data, media_type=file.media_type, headers=headers)
