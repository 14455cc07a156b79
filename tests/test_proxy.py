"""The proxy of compose.yaml, a real nginx: it speaks TLS, and a node that falls is no matter."""
import contextlib
import os
import re
import shutil
import socket
import ssl
import subprocess
import time
import urllib.request

from tests.test_deploy import COMPOSE, DEPLOY, needs


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Proxy:
    """nginx with the shop's file and compose's certificate, in front of servers of this machine."""

    def __init__(self, folder, targets):
        self.plain, self.tls = free_port(), free_port()
        command = COMPOSE["services"]["certificate"]["command"][2]
        subprocess.run(["sh", "-c", command.replace("/certificate", str(folder))], check=True,
                       capture_output=True)
        text = (DEPLOY / "nginx.conf").read_text().replace("/certificate", str(folder))
        text = re.sub(r"\b8080\b", str(self.plain), text)
        text = re.sub(r"\b8443\b", str(self.tls), text).replace("listen ", "listen 127.0.0.1:")
        # An older nginx doesn't know `resolve`.
        text = re.sub(r"server api:8000 resolve (.*)", lambda found: "\n".join(
            f"server 127.0.0.1:{port} {found[1]}" for port in targets), text)
        self.config = folder / "nginx.conf"
        self.config.write_text(f"pid {folder}/pid;\nerror_log {folder}/error.log;\ndaemon off;\n"
                               f"events {{}}\nhttp {{\naccess_log off;\n{text}}}\n")
        self.program = shutil.which("nginx", path=os.environ["PATH"] + ":/usr/sbin")
        self.trust = ssl.create_default_context(cafile=folder / "tls.crt")

    def run(self, *options):
        return subprocess.run([self.program, "-c", self.config, *options], capture_output=True,
                              text=True)

    @contextlib.contextmanager
    def running(self):
        process = subprocess.Popen([self.program, "-c", self.config])
        try:
            end = time.monotonic() + 10
            while True:
                with contextlib.suppress(OSError):
                    socket.create_connection(("127.0.0.1", self.tls)).close()
                    break
                assert time.monotonic() < end
                time.sleep(0.05)
            yield
        finally:
            process.terminate()
            process.wait()

    def get(self, path, plain=False):
        where = f"http://127.0.0.1:{self.plain}" if plain else f"https://127.0.0.1:{self.tls}"
        return urllib.request.urlopen(where + path, timeout=10, context=self.trust)


@needs("nginx", "nginx-light")
@needs("openssl", "openssl")
def test_nginx_takes_the_file(tmp_path):
    done = Proxy(tmp_path, [1]).run("-t")
    assert done.returncode == 0, done.stderr
    assert "warn" not in done.stderr


@needs("nginx", "nginx-light")
@needs("openssl", "openssl")
def test_behind_the_proxy_a_node_may_fall_and_nobody_notices(serve, tmp_path):
    nodes = [serve(workers=1, APP_ENV="production", TRUSTED_PROXIES="1") for _ in range(2)]
    proxy = Proxy(tmp_path, [node.port for node in nodes])
    with proxy.running():
        with proxy.get("/health/ready", plain=True) as answer:  # is led to TLS
            assert answer.url == f"https://127.0.0.1:{proxy.tls}/health/ready"
        for turn in range(40):
            if turn == 10:
                nodes[0].stop(9)
            with proxy.get("/api/v1/categories") as answer:
                assert answer.status == 200
                assert "max-age" in answer.headers["Strict-Transport-Security"]
