"""Compression: zstd, br or gzip, as the client prefers; never for answers that carry tokens.

An answer with ``Cache-Control: no-store`` carries tokens or sessions. Compressing secrets together
with text that a caller can choose leaks them through the compressed length (BREACH).
"""
import gzip
import zlib
from functools import lru_cache

import brotli
from backports import zstd
from flask import Flask, request
from werkzeug.datastructures import MIMEAccept
from werkzeug.http import parse_accept_header

MIN_SIZE = 500
TYPES = {"application/json", "application/problem+json", "application/x-ndjson", "text/csv",
         "text/html", "text/css", "text/javascript", "application/javascript"}
ORDER = ("zstd", "br", "gzip")  # fastest first; decides between equal preferences

COMPRESS = {
    "zstd": lambda data: zstd.compress(data, 3),
    "br": lambda data: brotli.compress(data, quality=4),
    "gzip": lambda data: gzip.compress(data, 6, mtime=0),
}


class _Brotli:
    def __init__(self):
        self._inner = brotli.Compressor(quality=4)
        self.compress, self.flush = self._inner.process, self._inner.finish


STREAM = {
    "zstd": lambda: zstd.ZstdCompressor(level=3),
    "br": _Brotli,
    "gzip": lambda: zlib.compressobj(6, zlib.DEFLATED, zlib.MAX_WBITS + 16),
}


@lru_cache(maxsize=256)
def choose(accept_encoding: str) -> str | None:
    """The encoding for an Accept-Encoding header (RFC 9110, 12.5.3), or None for identity."""
    accept = parse_accept_header(accept_encoding, MIMEAccept)
    named = {name.lower(): quality for name, quality in accept}
    rest = named.get("*", 0)
    best = max(ORDER, key=lambda name: (named.get(name, rest), -ORDER.index(name)))
    quality = named.get(best, rest)
    return best if quality > 0 and quality >= named.get("identity", 0) else None


def wanted() -> str | None:
    """The encoding that the current request prefers, or None."""
    return choose(request.headers.get("Accept-Encoding", ""))


def init_app(app: Flask) -> None:
    @app.after_request
    def compress(response):
        if response.headers.get("Vary") == "Accept-Encoding":  # already handled by the cache
            return response
        if response.status_code == 304:  # needs the Vary of its 200 (RFC 9110, 15.4.5)
            response.vary.add("Accept-Encoding")
            return response
        secret = (response.headers.get("Cache-Control") == "no-store"
                  and response.mimetype != "application/problem+json")
        if response.mimetype not in TYPES or secret:
            return response
        response.vary.add("Accept-Encoding")
        encoding = wanted()
        if encoding is None:
            return response
        if response.is_streamed:
            chunks = response.response
            response.response = _compressed(chunks, STREAM[encoding]())
            if hasattr(chunks, "close"):  # a generator that never starts runs no ``finally``
                response.call_on_close(chunks.close)
            response.headers.pop("Content-Length", None)
        else:
            data = response.get_data()
            if len(data) < MIN_SIZE:
                return response
            response.set_data(COMPRESS[encoding](data))
        response.headers["Content-Encoding"] = encoding
        return response


def _compressed(chunks, compressor):
    try:
        for chunk in chunks:
            if out := compressor.compress(chunk):
                yield out
        yield compressor.flush()
    finally:
        if hasattr(chunks, "close"):
            chunks.close()
