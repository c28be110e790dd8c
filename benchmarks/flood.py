"""The server's memory while sites upload as much as they can, through nginx: SuperLink's peak before and after.

    six sites with certificates send 250 MiB each, to every call that a node has, with and without a stated length;
    then as many uploads at a time as a certificate may have, each as long as the recipe allows

Usage: python -m benchmarks.flood [RECIPE]        default: recipes/demo.toml
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

from fedferret import load_recipe
from fedferret.disk import update_bytes
from fedferret.sites import flower_process, nginx
from fedferret.sites.control import Control
from fedferret.sites.credentials import read_server
from fedferret.sites.pki import Authority
from fedferret.sites.proxy import Proxy

SITES, BODY, PIECE = 6, 250 << 20, bytes(1 << 20)
RECIPE = Path("recipes/demo.toml")


def peak(process: int) -> float:
    """The most memory that a process had, in MB."""
    (line,) = [line for line in Path(f"/proc/{process}/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1000


def upload(port: int, authority: Path, site: Path, name: str, size: int, chunked: bool) -> None:
    """Send a body to a call, until it is refused."""
    import http.client
    import ssl

    context = ssl.create_default_context(cafile=str(authority))
    context.load_cert_chain(site / "site.crt", site / "site.key")
    line = http.client.HTTPSConnection("localhost", port, context=context, timeout=60)
    body = (PIECE[: min(len(PIECE), size - at)] for at in range(0, size, len(PIECE)))
    headers = {"Content-Type": "application/x-protobuf"} | ({} if chunked else {"Content-Length": str(size)})
    with suppress(OSError, http.client.HTTPException):
        line.request("POST", f"/v1/fleet/{name}", body, headers, encode_chunked=chunked)
        line.getresponse().read()
    line.close()


def flood(folder: Path, limits: nginx.Limits | None, body: int = BODY) -> tuple[float, float, float]:
    """SuperLink's peak before, after such bodies, and after as many uploads at a time as are allowed, in MB.

    Args:
        folder: for credentials, logs and the SuperLink's files; made if missing.
        limits: of nginx; None: the default ones.
        body: bytes that each site sends to each call.
    """
    folder.mkdir(exist_ok=True)
    authority = Authority.create(folder / "pki", ["localhost"])
    sites = [authority.issue(f"site-{number}").with_suffix("") for number in range(SITES)]
    server, port, inner = read_server(folder / "pki"), flower_process.free_port(), flower_process.free_port()
    certificates = flower_process.Certificates(server.authority, *server.superlink)
    command = flower_process.superlink("127.0.0.1", inner, folder, certificates)
    environment = os.environ | flower_process.environment(folder / "flower")
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        control = Control(f"127.0.0.1:{inner}", server.authority)
        control.wait(180, lambda: process.poll() is None)
        known = [peak(process.pid)]
        with Proxy(folder / "nginx", server, f"127.0.0.1:{port}", f"127.0.0.1:{inner}", limits):
            allowed = (limits or nginx.Limits()).upload
            for calls in (
                [(site, name, body, chunked) for name in nginx.FLEET for site in sites for chunked in (False, True)],
                [(site, "push-object", allowed, False) for site in sites for _ in range(8)],
            ):
                threads = [
                    threading.Thread(target=upload, args=(port, server.authority, site, name, size, chunked))
                    for site, name, size, chunked in calls
                ]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                known.append(peak(process.pid))
        return known[0], known[1], known[2]
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    """Print the peaks for a recipe."""
    recipe = load_recipe(Path(sys.argv[1]) if len(sys.argv) > 1 else RECIPE)
    limits = nginx.Limits(upload=nginx.upload_limit(update_bytes(recipe)))
    with tempfile.TemporaryDirectory() as folder:
        before, bodies, uploads = flood(Path(folder), limits)
    print(f"an update has at most {update_bytes(recipe):,.0f} bytes; an upload may have {limits.upload:,}")
    print(f"SuperLink's peak at the start: {before:.0f} MB")
    print(f"after {SITES} sites sent 250 MiB to every call: {bodies:.0f} MB")
    print(f"after they sent 8 uploads each at a time, as long as the recipe allows: {uploads:.0f} MB")


if __name__ == "__main__":
    main()
