"""The files of deploy/: read by the programs they are for, and real requests through nginx, Caddy and HAProxy."""

from __future__ import annotations

import base64
import contextlib
import getpass
import hashlib
import http.client
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from conformance.certificates import Authority, Pair
from conformance.servers import REPOSITORY, Demo, demo, stop

DEPLOY = REPOSITORY / "deploy"
MIB = 1024 * 1024
PATIENCE_S = 30
HAPROXY = "127.0.0.3"  # where HAProxy connects from, so that only it has to send a PROXY header
CLIENT = "127.0.0.5"  # where we connect from: the server trusts only 127.0.0.1
EXPOSURE = 20  # of systemd-analyze security, tenths: below 2.0 of 10
SYNC = "sync.localhost"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port


def until(condition: Any, process: subprocess.Popen[bytes] | None = None) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        assert process is None or process.poll() is None, "the program ended"
        time.sleep(0.05)


def run(*command: str | Path, **environment: str) -> str:
    """Run a program to its end; what it says is in the failure."""
    words = [str(word) for word in command]
    done = subprocess.run(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **environment},
        check=False,
    )
    text = done.stdout.decode(errors="replace")
    assert done.returncode == 0, f"{words}: {text}"
    return text


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


# -- what is behind the proxies -------------------------------------------------------------------


@dataclass(frozen=True)
class Backend:
    server: Demo
    tls_port: int
    authority: Authority
    pair: Pair

    @property
    def port(self) -> int:
        return int(self.server.url.rpartition(":")[2])


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    """A demo that believes its proxies, and sends everybody else to HTTPS."""
    folder = tmp_path_factory.mktemp("backend")
    authority = Authority(folder / "tls")
    pair = authority.issue("server", SYNC, "*.connect.localhost")
    port = free_port()
    settings = ['server.trusted_proxies=["127.0.0.1"]', f'server.proxy_protocol=["{HAPROXY}"]']
    settings += ["server.redirect_https_port=443", f'server.listen_tls=["127.0.0.1:{port}"]']
    settings += [*pair.settings(), "log.level=info", "server.workers=1"]
    with demo(folder / "data", settings=settings) as server:
        yield Backend(server, port, authority, pair)


@dataclass(frozen=True)
class Front:
    """A proxy that runs."""

    name: str
    port: int  # HTTPS
    plain_port: int
    backend: Backend

    def talk(self, host: str) -> http.client.HTTPSConnection:
        """A connection for one host name, with its certificate checked."""
        context = ssl.create_default_context(cafile=self.backend.authority.file)
        connection = http.client.HTTPSConnection(host, self.port, context=context, timeout=60)
        plain = socket.create_connection(("127.0.0.1", self.port), timeout=60, source_address=(CLIENT, 0))
        connection.sock = context.wrap_socket(plain, server_hostname=host)
        return connection

    def ask(
        self,
        host: str,
        method: str,
        path: str,
        account: Mapping[str, Any],
        body: Any = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, Mapping[str, str], bytes]:
        secret = account["application_password"] or account["password"]
        token = base64.b64encode(f"{account['login']}:{secret}".encode()).decode()
        fields = {"Authorization": f"Basic {token}", "Host": f"{host}:{self.port}", **(headers or {})}
        chunked = body is not None and not isinstance(body, bytes)
        if chunked:
            fields["Transfer-Encoding"] = "chunked"
        connection = self.talk(host)
        try:
            connection.request(method, path, body, fields, encode_chunked=chunked)
            answer = connection.getresponse()
            headers = {name.lower(): value for name, value in answer.headers.items()}
            return answer.status, headers, answer.read()
        finally:
            connection.close()


def drive_host(account: Mapping[str, Any]) -> str:
    return f"{account['drives'][0]['id']}.connect.localhost"


def rewritten(text: str, replaced: Mapping[str, str]) -> str:
    """The file as it is shipped but for addresses, names and paths; each has to be in it."""
    for old, new in replaced.items():
        assert old in text, old
        text = text.replace(old, new)
    return text


def names_and_files(backend: Backend) -> dict[str, str]:
    return {
        "sync.example.org": SYNC,
        "*.connect.example.org": "*.connect.localhost",
        "/etc/ksync/tls/fullchain.pem": str(backend.pair.certificate),
        "/etc/ksync/tls/privkey.pem": str(backend.pair.key),
    }


def nginx(folder: Path, backend: Backend, port: int, plain: int) -> tuple[list[str], dict[str, str]]:
    site = rewritten(
        (DEPLOY / "nginx.conf").read_text(),
        {
            **names_and_files(backend),
            "    listen [::]:80;\n": "",
            "    listen [::]:443 ssl;\n": "",
            "listen 80;": f"listen 127.0.0.1:{plain};",
            "listen 443 ssl;": f"listen 127.0.0.1:{port} ssl;",
            "127.0.0.1:8080": f"127.0.0.1:{backend.port}",
        },
    )
    (folder / "ksync.conf").write_text(site)
    temporary = "".join(
        f"{name}_temp_path {folder}/{name};\n"
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root;\n" if os.getuid() == 0 else ""
    (folder / "main.conf").write_text(
        f"{user}daemon off;\nworker_processes 1;\npid {folder}/pid;\nerror_log stderr;\n"
        f"events {{}}\nhttp {{\naccess_log off;\n{temporary}include {folder}/ksync.conf;\n}}\n"
    )
    command = ["nginx", "-p", str(folder), "-c", str(folder / "main.conf"), "-e", "stderr"]
    run(*command, "-t")
    return command, {}


def caddy(folder: Path, backend: Backend, port: int, plain: int) -> tuple[list[str], dict[str, str]]:
    replaced = {**names_and_files(backend), "127.0.0.1:8080": f"127.0.0.1:{backend.port}"}
    head = f"{{\n\tadmin off\n\thttp_port {plain}\n\thttps_port {port}\n\tdefault_bind 127.0.0.1\n}}\n"
    (folder / "Caddyfile").write_text(head + rewritten((DEPLOY / "Caddyfile").read_text(), replaced))
    environment = {"HOME": str(folder), "XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}
    arguments = ["--config", str(folder / "Caddyfile"), "--adapter", "caddyfile"]
    run("caddy", "validate", *arguments, **environment)
    return ["caddy", "run", *arguments], environment


def haproxy(folder: Path, backend: Backend, port: int, plain: int) -> tuple[list[str], dict[str, str]]:
    file = folder / "haproxy.cfg"
    replaced = {"bind :443": f"bind 127.0.0.1:{port}"}
    replaced["127.0.0.1:8443 send"] = f"127.0.0.1:{backend.tls_port} source {HAPROXY} send"
    file.write_text(rewritten((DEPLOY / "haproxy.cfg").read_text(), replaced))
    run("haproxy", "-c", "-f", file)
    return ["haproxy", "-db", "-f", str(file)], {}


PROXIES = {"nginx": nginx, "caddy": caddy, "haproxy": haproxy}


@pytest.fixture(scope="module", params=PROXIES)
def front(
    request: pytest.FixtureRequest, backend: Backend, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Front]:
    """The shipped configuration of each proxy, checked by the proxy itself and running."""
    folder = tmp_path_factory.mktemp(request.param)
    port, plain = free_port(), free_port()
    command, environment = PROXIES[request.param](folder, backend, port, plain)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **environment},
            start_new_session=True,
        )
    try:
        until(lambda: answers(port), process)
        yield Front(request.param, port, plain, backend)
    finally:
        stop(process)


# -- requests through them ------------------------------------------------------------------------


def test_a_password_is_taken_because_the_proxy_tells_of_https(front: Front) -> None:
    alice = front.backend.server.account("alice")
    status, _, _ = front.ask(SYNC, "PROPFIND", "/", alice, headers={"Depth": "0"})
    assert status == 207
    direct = http.client.HTTPConnection("127.0.0.1", front.backend.port, timeout=30)
    direct.request("GET", "/", headers={"Host": SYNC})
    refused = direct.getresponse()
    refused.read()
    direct.close()
    assert (refused.status, refused.headers["Location"]) == (301, f"https://{SYNC}/"), "without it, never"


def test_what_a_client_says_of_proxies_is_not_believed(front: Front) -> None:
    alice = front.backend.server.account("alice")
    forged = {"X-Forwarded-Proto": "http", "X-Forwarded-Host": "evil.example.org", "Depth": "0"}
    status, _, _ = front.ask(SYNC, "PROPFIND", "/", alice, headers=forged)
    assert status == 207


def test_a_chunked_upload_of_50_mb_streams_through(front: Front) -> None:
    alice = front.backend.server.account("alice")
    host, path = drive_host(alice), f"/through-{front.name}.bin"
    piece = os.urandom(MIB)
    digest = hashlib.sha256()

    def begun() -> bool:
        with urllib.request.urlopen(
            front.backend.server.ready["admin_url"] + "metrics", timeout=30
        ) as answer:
            return (
                re.search(r"^ksync_requests_running [1-9]", answer.read().decode(), re.MULTILINE) is not None
            )

    def body() -> Iterator[bytes]:
        for at in range(50):
            if at == 10:
                until(begun)  # the server works on it while we have not sent the rest
            digest.update(piece)
            yield piece

    status, _, text = front.ask(host, "PUT", path, alice, body())
    assert status == 201, text
    status, _, content = front.ask(host, "GET", path, alice)
    assert status == 200
    assert hashlib.sha256(content).digest() == digest.digest()


def test_hrefs_keep_the_form_of_the_client_and_destination_is_understood(front: Front) -> None:
    alice = front.backend.server.account("alice")
    host = drive_host(alice)
    base = f"/folder%20{front.name}/"
    assert front.ask(host, "MKCOL", base, alice)[0] == 201
    assert front.ask(host, "PUT", f"{base}a%C3%A9", alice, b"content")[0] == 201
    destination = {"Destination": f"https://{host}:{front.port}{base}b%C3%A9", "Overwrite": "F"}
    assert front.ask(host, "MOVE", f"{base}a%C3%A9", alice, headers=destination)[0] == 201
    elsewhere = {"Destination": f"https://elsewhere.example.org{base}c"}
    assert front.ask(host, "COPY", f"{base}b%C3%A9", alice, headers=elsewhere)[0] == 502
    status, _, body = front.ask(host, "PROPFIND", base, alice, headers={"Depth": "1"})
    assert status == 207
    hrefs = {each.text for each in ET.fromstring(body).iter("{DAV:}href")}
    assert hrefs == {base, f"{base}b%C3%A9"}


def test_a_redirect_leads_back_through_the_proxy(front: Front) -> None:
    alice = front.backend.server.account("alice")
    status, headers, _ = front.ask(SYNC, "GET", "/.well-known/caldav", alice)
    assert status == 301
    location = headers["location"]
    assert location.startswith(("/", f"https://{SYNC}:{front.port}/")), location


@pytest.mark.parametrize("form", ["declared", "chunked"])
def test_a_client_sees_413(front: Front, form: str, tmp_path: Path) -> None:
    """curl reads while it sends, as WebDAV programs do, and here it does not ask first (Expect)."""
    dave = front.backend.server.account("dave")
    host = drive_host(dave)
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate((65 if form == "declared" else 40) * MIB)
    command = ["curl", "-sS", "--http1.1", "-T", large, "-w", " %{http_code}", "-H", "Expect:"]
    command += ["-H", "Transfer-Encoding: chunked"] if form == "chunked" else []
    command += ["--cacert", front.backend.authority.file, "--resolve", f"{host}:{front.port}:127.0.0.1"]
    command += ["-u", f"{dave['login']}:{dave['password']}", f"https://{host}:{front.port}/large.bin"]
    assert run(*command).endswith(" 413")
    assert front.ask(host, "GET", "/large.bin", dave)[0] == 404


def test_a_second_factor_and_wrong_passwords_are_refused_as_without_a_proxy(front: Front) -> None:
    bob = dict(front.backend.server.account("bob"))
    assert front.ask(SYNC, "PROPFIND", "/", bob, headers={"Depth": "0"})[0] == 207
    bob["application_password"] = bob["password"]
    status, headers, _ = front.ask(SYNC, "PROPFIND", "/", bob, headers={"Depth": "0"})
    assert status == 401
    assert "www-authenticate" in headers


def test_the_log_names_the_client(backend: Backend, front: Front) -> None:
    """nginx adds to X-Forwarded-For, Caddy replaces it, HAProxy sends a PROXY header."""
    alice = backend.server.account("alice")
    before = backend.server.log.stat().st_size
    status, _, _ = front.ask(
        SYNC, "PROPFIND", "/", alice, headers={"X-Forwarded-For": "192.0.2.1", "Depth": "0"}
    )
    assert status == 207

    def logged() -> bool:
        with backend.server.log.open() as log:
            log.seek(before)
            return f" address={CLIENT}\n" in log.read()

    until(logged)


def test_plain_http_is_sent_to_https_by_the_proxy(front: Front) -> None:
    if front.name == "haproxy":  # has no plain side
        assert not answers(front.plain_port)
        return
    connection = http.client.HTTPConnection("127.0.0.1", front.plain_port, timeout=30)
    connection.request("PROPFIND", "/calendars/", headers={"Host": SYNC})
    answer = connection.getresponse()
    answer.read()
    connection.close()
    assert answer.status == 308
    assert answer.headers["Location"].startswith(f"https://{SYNC}")
    assert "WWW-Authenticate" not in answer.headers


# -- systemd, certbot -----------------------------------------------------------------------------


@pytest.fixture
def units(tmp_path: Path) -> list[Path]:
    """The units with the program where it is here."""
    program = {"/opt/ksync/bin/ksync-server": f"{Path(sys.prefix) / 'bin' / 'ksync-server'}"}
    made = []
    for name in ("ksync-server.service", "ksync-server.socket"):
        text = (DEPLOY / name).read_text()
        path = tmp_path / name
        path.write_text(rewritten(text, program) if name.endswith("service") else text)
        made.append(path)
    return made


def test_systemd_accepts_the_units_without_a_word(units: list[Path]) -> None:
    assert run("systemd-analyze", "verify", *units) == ""


def test_the_service_is_confined(units: list[Path]) -> None:
    said = run("systemd-analyze", "security", "--offline=true", f"--threshold={EXPOSURE}", units[0])
    assert "Overall exposure level" in said


def test_the_hook_of_certbot_hands_over_what_was_renewed(tmp_path: Path) -> None:
    lineage, into = tmp_path / "live", tmp_path / "tls"
    lineage.mkdir()
    for name in ("fullchain.pem", "privkey.pem"):
        (lineage / name).write_text(name)
    for _ in range(2):
        run(DEPLOY / "certbot-hook.sh", into, getpass.getuser(), RENEWED_LINEAGE=str(lineage))
    assert {path.name for path in into.iterdir()} == {"fullchain.pem", "privkey.pem"}
    assert (into / "privkey.pem").read_text() == "privkey.pem"
    assert (into / "privkey.pem").stat().st_mode & 0o777 == 0o400
    assert into.stat().st_mode & 0o777 == 0o700


# -- the container file ---------------------------------------------------------------------------


def instructions(text: str) -> list[tuple[str, str]]:
    joined = re.sub(r"\\\n\s*", " ", text)
    lines = [line for line in joined.splitlines() if line and not line.startswith("#")]
    return [(line.partition(" ")[0], line.partition(" ")[2]) for line in lines]


def test_the_steps_of_the_container_file_make_a_server_that_is_healthy(tmp_path: Path) -> None:
    """Every step in order as a builder does it, but in a folder instead of a root of its own."""
    root, source = tmp_path / "root", tmp_path / "source"
    variables = {"PREFIX": str(root), "SOURCE": str(source)}
    for name in ("passwd", "group", "shadow", "gshadow", "login.defs"):
        (tmp_path / "etc").mkdir(exist_ok=True)
        (tmp_path / "etc" / name).touch()
    rest: dict[str, str] = {}
    for word, argument in instructions((DEPLOY / "Containerfile").read_text()):
        value = re.sub(r"\$\{(\w+)\}", lambda found: variables[found[1]], argument)
        if word == "COPY":
            *origins, into = value.split()
            copy(origins, Path(into), into.endswith("/"))
        elif word == "RUN":
            command = value.replace("useradd ", f"useradd --prefix {tmp_path} ").replace(" --create-home", "")
            run("sh", "-euc", command, PIP_DISABLE_PIP_VERSION_CHECK="1")
        elif word == "ENV":
            variables.update(pair.split("=", 1) for pair in value.split())
        elif word != "ARG":
            rest[word] = value
    assert re.search(r"^ksync:", (tmp_path / "etc" / "passwd").read_text(), re.MULTILINE)
    assert rest["USER"] == "ksync"
    assert not source.exists()

    port, admin = free_port(), free_port()
    config = tmp_path / "ksync.toml"
    config.write_text(f'[server]\nlisten = ["127.0.0.1:{port}"]\nadmin_listen = "127.0.0.1:{admin}"\n')
    environment = {"PATH": variables["PATH"], "KSYNC_CONFIG": str(config)}
    entry = json.loads(rest["ENTRYPOINT"])
    program = str(shutil.which(entry[0], path=variables["PATH"]))
    assert program == f"{root}/bin/ksync-server"
    run(program, "migrate", **environment)
    process = subprocess.Popen([program, *json.loads(rest["CMD"])], env={**os.environ, **environment})
    try:
        until(lambda: answers(admin), process)
        check = json.loads(rest["HEALTHCHECK"].partition(" CMD ")[2].replace(":8081", f":{admin}"))
        run(*check, **environment)
    finally:
        assert stop(process) == 0
    with contextlib.suppress(subprocess.CalledProcessError):
        failed = subprocess.run(check, env={**os.environ, **environment}, capture_output=True, check=False)
        assert failed.returncode != 0, "a server that has ended is not healthy"


def copy(origins: list[str], into: Path, is_folder: bool) -> None:
    """COPY: files into a folder, a folder's content into another."""
    for origin in (REPOSITORY / name for name in origins):
        if origin.is_dir():
            shutil.copytree(origin, into, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
        else:
            into.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(origin, into / origin.name if is_folder else into)
