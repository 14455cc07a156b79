"""HTTP without a client library between a test and the bytes."""
import contextlib
import socket

from werkzeug.datastructures import Headers


class Wire:
    """A raw connection to a server."""

    def __init__(self, server, data=b""):
        self.sock = socket.create_connection(("127.0.0.1", server.port), timeout=45)
        self.sock.sendall(data)
        self.left = b""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.sock.close()

    def send(self, data):
        self.sock.sendall(data)

    def answer(self):
        """(status, headers, body) of the next answer."""
        while b"\r\n\r\n" not in self.left:
            self.left += self._more()
        head, _, self.left = self.left.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = Headers([line.split(": ", 1) for line in lines])
        length = int(headers.get("Content-Length", 0))
        while len(self.left) < length:
            self.left += self._more()
        body, self.left = self.left[:length], self.left[length:]
        return int(first.split()[1]), headers, body

    def more(self):
        """Whether another answer comes before the server closes."""
        if not self.left:
            with contextlib.suppress(ConnectionResetError):
                self.left = self.sock.recv(65536)
        return bool(self.left)

    def closed(self):
        """Whether the server says no more and closes."""
        try:
            return self.sock.recv(65536) == b""
        except ConnectionResetError:
            return True

    def _more(self):
        data = self.sock.recv(65536)
        assert data, f"closed behind {self.left[:200]}"
        return data
