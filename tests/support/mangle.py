"""Requests to the HTTP API that are wrong in every way that a seeded generator thinks of, a few of them right."""

import io
import json
import struct
import zlib
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

FILES = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
PATHS = ("/v1/images/generations", "/v1/images/edits", "/v1/images/variations", "/v1/images/denoise")
# JSON texts of values that fit hardly any field; none asks for much work where it fits
JSON_VALUES = (
    "null", "true", "false", "0", "-1", "1", "2", "1.5", "-0.0", "NaN", "Infinity", "-Infinity", "1e400", "1e-400",
    "9223372036854775807", "4611686018427387904", "-99999999999999999999", "1" * 400, "1" * 5000, '""', '"cat"',
    '"0"', '"1e3"', '"\\ud800"', '"\\u0000"', '"\\u202e\\ufeff"', '"' + "x" * 3000 + '"', "[]", "[1]", "[[[]]]", "{}",
    '{"a": 1}', '{"\\ud800": 1}', "[" * 900 + "]" * 900, "'cat'", "undefined", "01", "+1", "0x10",
)  # fmt: skip
TEXT_VALUES = (
    "", " ", "null", "true", "0", "-1", "1", "2", "nan", "inf", "-inf", "1e400", "1_0", "٣", "0x10", "9" * 400,
    "cat", "\x00", "\u202e", "x" * 3000, "[]", "{}", "8x8", "8X8", "0x0", "auto", "../../etc/passwd", "file:///etc",
)  # fmt: skip
NAMES = (
    "model", "prompt", "negative_prompt", "n", "size", "response_format", "output_format", "output_compression",
    "stream", "partial_images", "background", "quality", "moderation", "user", "seed", "priority", "timeout",
    "parent", "strength", "sampler", "grid", "eta", "guidance_scale", "guidance_low", "guidance_high",
    "guidance_rescale", "image", "mask", "noise_level", "inpainting", "image[]", "steps", "unknown", "", "__proto__",
    "\\ud800", "\\u0000", "n" * 500,
)  # fmt: skip
CONTENT_TYPES = (
    "application/json", "application/json; charset=utf-16", "application/ld+json", "text/plain", "image/png", "",
    "application/x-www-form-urlencoded", "multipart/form-data", "multipart/form-data; boundary=",
    "multipart/form-data; boundary=other", "multipart/mixed; boundary=b", "a/b/c", "application/json, text/plain",
    "multipart/form-data; boundary=" + "b" * 300, 'multipart/form-data; boundary="b', "\x7f",
)  # fmt: skip
_OTHER_PATHS = (
    "/v1/models", "/v1/models/tiny", "/v1/models/%00", "/v1/models/..%2f..%2fetc", "//", "/v1/models/%ff", "/healthz",
    "/readyz", "/docs", "/openapi.json", "/%", "/" + "a" * 5000,
)  # fmt: skip
BOUNDARY = "b"


@dataclass(frozen=True)
class Mangled:
    """A request as it is sent."""

    method: str
    path: str
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def requests(chance, count):
    """So many requests, keyed by `chance`."""
    kinds = (_json_values, _json_bytes, _content_type, _form, _form, _form_bytes, _picture, _picture, _picture, _place)
    return [chance.choice(kinds)(chance) for _ in range(count)]


def form(fields, files=(), boundary=BOUNDARY):
    """A multipart body of (name, text) and (name, file name, type, bytes)."""
    parts = [(f'form-data; name="{name}"', "", text.encode()) for name, text in fields]
    for name, filename, kind, data in files:
        parts.append((f'form-data; name="{name}"; filename="{filename}"', f"Content-Type: {kind}\r\n", data))
    lines = [
        f"--{boundary}\r\nContent-Disposition: {place}\r\n{kind}\r\n".encode() + data + b"\r\n"
        for place, kind, data in parts
    ]
    return b"".join(lines) + f"--{boundary}--\r\n".encode()


def png(width, height, rows=None, bits=8, colour=2):
    """A PNG that says it is so large, whatever its rows hold."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    data = zlib.compress(bytes(height * (1 + 3 * width)) if rows is None else rows, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def picture(chance, kind=None, size=None):
    """A whole file of noise, some of it transparent where the format has that."""
    kind = kind or chance.choice(FILES)
    width, height = size or (chance.choice((1, 7, 8, 9, 16, 33)), chance.choice((1, 8, 8, 20)))
    mode = "RGBA" if kind in ("PNG", "WEBP", "TIFF") else chance.choice(("RGB", "L"))
    channels = {"RGBA": 4, "RGB": 3, "L": 1}[mode]
    noise = np.random.default_rng(chance.getrandbits(32)).integers(256, size=(height, width, channels), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise if channels > 1 else noise[:, :, 0]).save(buffer, format=kind)
    return buffer.getvalue()


def damaged(chance, data):
    """The same bytes cut short, with other bits, some missing, or some more."""
    data = bytearray(data)
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(max(1, len(data)))
        how = chance.randrange(5)
        if how == 0:
            del data[at:]
        elif how == 1 and data:
            data[min(at, len(data) - 1)] ^= 1 << chance.randrange(8)
        elif how == 2:
            del data[at : at + chance.randint(1, 20)]
        elif how == 3:
            data[at:at] = chance.randbytes(chance.randint(1, 20))
        else:
            data[at : at + 4] = chance.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff"))
    return bytes(data)


def _base(chance):
    return {"steps": "1", "seed": str(chance.randrange(100)), "timeout": "20"}


def _json_values(chance):
    """A JSON object some of whose values are of the wrong kind."""
    body = _base(chance)
    for _ in range(chance.randint(1, 3)):
        body[chance.choice(NAMES)] = chance.choice(JSON_VALUES)
    return _posted(PATHS[0], _object(body), "application/json")


def _json_bytes(chance):
    """JSON that is none."""
    text = _object(_base(chance))
    body = chance.choice(
        (
            damaged(chance, text), text.decode().encode("utf-16"), b"\xef\xbb\xbf" + text, text[:-1], b"", b"null",
            b"[]", b'"text"', b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe", b'{"seed": 1, "seed": "a"}', text * 2,
            b'{"prompt": "\xff"}', b'{"prompt": "\xed\xa0\x80"}', b"\0" * 100,
        )
    )  # fmt: skip
    return _posted(PATHS[0], body, "application/json")


def _content_type(chance):
    """A body under another content type than it has."""
    body = chance.choice((_object(_base(chance)), form(_base(chance).items(), [_file("image", picture(chance))])))
    return _posted(chance.choice(PATHS), body, chance.choice(CONTENT_TYPES))


def _form(chance):
    """A form some of whose fields are wrong, twice there, or files where they should be texts and the other way."""
    fields = list(_base(chance).items())
    names = [name for name in NAMES if "\\" not in name]
    fields += [(chance.choice(names), chance.choice(TEXT_VALUES)) for _ in range(chance.randint(0, 3))]
    fields += chance.choices(fields, k=chance.randint(0, 2))
    wanted = chance.choice((["image"], ["image"], ["image", "mask"], ["mask"], ["image", "image"], [], ["prompt"]))
    files = [_file(name, picture(chance)) for name in wanted]
    return _posted(chance.choice(PATHS[1:]), form(fields, files), f"multipart/form-data; boundary={BOUNDARY}")


def _form_bytes(chance):
    """A form whose bytes are damaged, or that has too much of something."""
    whole = form(_base(chance).items(), [_file("image", picture(chance))])
    body = chance.choice(
        (
            damaged(chance, whole), whole[:-4], whole.replace(b"\r\n", b"\n"), whole + whole, b"", b"--b", b"--b--\r\n",
            whole.replace(b"Content-Disposition", b"X-Other"), whole.replace(b'name="image"', b'name="'),
            form([(f"f{at}", "") for at in range(1500)]), form([("prompt", "x" * 1_100_000)]),
            form([], [_file("image", b"") for _ in range(1100)]), whole.replace(b'"image"', b"image"),
            whole.replace(b"image/png", b"x" * 70_000), whole.replace(b'filename="a"', b'filename="../\xff\0"'),
        )
    )  # fmt: skip
    return _posted(chance.choice(PATHS[1:]), body, f"multipart/form-data; boundary={BOUNDARY}")


def _picture(chance):
    """A picture that is damaged, or lies about its size, or is odd; and masks that do not belong to it."""
    image = chance.choice(
        (
            damaged(chance, picture(chance)), damaged(chance, picture(chance)), damaged(chance, picture(chance)),
            picture(chance), png(0, 0), png(0, 8), png(1 << 31, 1 << 31, b"\0"), png(60_000, 60_000, b"\0"),
            png(1000, 1001), png(8, 8, b"\0"), png(8, 8, bytes(10)), png(8, 8, bits=3), png(8, 8, colour=7),
            png(20_000, 1), png(1, 20_000), b"GIF89a\0\0\0\0\0\0\0;", b"GIF89a\xff\xff\xff\xff\0\0\0;",
            b"BM" + bytes(60), b"RIFF\xff\xff\xff\xffWEBPVP8 ", b"\xff\xd8\xff\xd9", b"II*\0\xff\xff\xff\xff",
            b"<svg/>", b"%PDF-1.4",
        )
    )  # fmt: skip
    files = [_file("image", image)]
    path = chance.choice(PATHS[1:])
    if path == "/v1/images/edits" and chance.random() < 0.5:
        mask = chance.choice((picture(chance), picture(chance, "JPEG"), damaged(chance, picture(chance)), png(8, 8)))
        files.append(_file("mask", mask))
    fields = [*_base(chance).items(), ("output_format", chance.choice(("png", "jpeg", "webp")))]
    return _posted(path, form(fields, files), f"multipart/form-data; boundary={BOUNDARY}")


def _place(chance):
    """Other paths, methods, queries and headers."""
    path = chance.choice((*PATHS, *_OTHER_PATHS))
    method = chance.choice(("GET", "GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "POST", "TRACE"))
    headers = chance.choice(
        (
            {}, {"Authorization": "Bearer"}, {"Authorization": "Bearer " + "x" * 20_000}, {"X-Long": "y" * 30_000},
            {"Origin": "https://other.example", "Access-Control-Request-Method": "POST"}, {"Expect": "more"},
            {"Accept": "image/png;q=NaN"}, {"Range": "bytes=-1"}, {"Content-Encoding": "gzip"},
        )
    )  # fmt: skip
    query = chance.choice(("", "?n=1", "?n=1&n=a&%ff=%00", "?" + "q" * 3000))
    return Mangled(method, path + query, b"", headers)


def _object(fields):
    """JSON of names and JSON texts."""
    return ("{" + ", ".join(f'"{name}": {text}' for name, text in fields.items()) + "}").encode()


def _file(name, data):
    return name, "a", "image/png", data


def _posted(path, body, kind):
    return Mangled("POST", path, body, {"Content-Type": kind})


def as_text(request):
    """A request in a line, for whoever has to look into it."""
    return json.dumps([request.method, request.path[:200], request.headers, repr(request.body[:600])])[:1500]
