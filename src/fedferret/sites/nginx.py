"""nginx's configuration for the port that sites call, as text.

Flower 1.41 serves nodes, operators and apps on one port, and operators need no login: whoever reaches ``/v1/control``
can start code on every node. So SuperLink listens on loopback, and ``FLEET`` names each call that nginx passes on to it
(``flwr/supernode/fleet_http_client.py``, ``flwr/superlink/routers/fleet/router.py``). nginx passes a call on under the
path in this configuration, however the client spelt it. Registering and unregistering are not among the calls:
the server registers nodes, by their public keys. A call must carry the node key that was issued together with the
certificate: a node key that was stolen from a site is of no use with another site's certificate.

SuperLink reads every request into memory before it looks at who sent it. So requests are small: a call may have
``call`` bytes, and an upload what the recipe's answers need (``upload_limit``). A reply names its objects in a call of
``announcement`` bytes and SuperLink stores only named objects of one reply to each request: so many objects of
``upload`` bytes are a site's quota of the database. A certificate, and an address, may have
so many requests at a time, and a certificate so many a second; what is over that is told to come again (503), as
Flower's clients do. A call is passed on once it is whole; an upload passes through, since nginx's workers, which root
starts as ``nobody``, cannot write to the run's folder. No update of a site is written to disk by nginx.

nginx checks certificates at every connection and resumes no TLS session, so that a revoked certificate is refused once
nginx has read the list.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from fedferret.core.errors import UserError
from fedferret.sites.certificates import node_key_header
from fedferret.sites.credentials import ServerCredentials

FLEET = (
    *("activate-node", "deactivate-node", "send-node-heartbeat"),
    *("pull-messages", "push-messages", "confirm-message-received"),
    *("pull-object", "push-object", "get-run", "get-fab"),
)

_SAFE_PATH = re.compile(r"[^\"'\\;{}$\x00-\x1f]+")  # characters without a meaning between quotes


_SMALLEST_UPLOAD = 1 << 20  # bytes that any site may upload in one call, however short the recipe's answers


@dataclass(frozen=True)
class Limits:
    """The proxy's limits for a site with a certificate."""

    upload: int = _SMALLEST_UPLOAD  # bytes of one upload of an object
    call: int = 8 << 10  # bytes of any other call: a node's have less than two thousand
    announcement: int = 3 << 10  # bytes of the call that names a reply's objects: 40 at most, where Flower has 3
    header_seconds: int = 20  # for the handshake and a request's head: a site with a bad connection needs three
    idle_seconds: int = 60  # between two reads or writes; flwr gives up after 30
    connections: int = 512  # in all, two for each site's request; nginx's default, below common limits of open files
    requests: int = 8  # of one certificate at a time; a node has two uploads, a poll and a heartbeat
    requests_of_address: int = 128  # at a time; many sites may be behind one address
    rate: int = 50  # requests of one certificate a second; a node has one every few seconds
    burst: int = 200  # requests of one certificate that may come at once


def upload_limit(update: float) -> int:
    """Return the bytes that one upload may have.

    Args:
        update: bytes of the longest update, by the method's formula, without framing.
    """
    return _SMALLEST_UPLOAD + 4 * int(update)


def configuration(folder: Path, listen: str, superlink: str, server: ServerCredentials, limits: Limits) -> str:
    """Return nginx's configuration.

    Args:
        folder: nginx's folder: process id, logs, temporary files.
        listen: where sites call, ADDRESS:PORT.
        superlink: the SuperLink on loopback, ADDRESS:PORT.
        server: the server's credentials.
        limits: for sites.
    Raises:
        UserError: for a path that nginx cannot read from its configuration.
    """
    certificate, key = server.proxy
    paths = {
        "folder": folder,
        "authority": server.authority,
        "revocations": server.revocations,
        "certificate": certificate,
        "key": key,
    }
    for path in paths.values():
        if not _SAFE_PATH.fullmatch(str(path)):
            raise UserError(f"{str(path)!r}: give a path without quotes, backslashes, braces, $ and ;, for nginx")
    sizes = {name: limits.call for name in FLEET}
    sizes |= {"push-object": limits.upload, "push-messages": limits.announcement}
    calls = "".join(
        _CALL.format(path=f"/v1/fleet/{name}", size=size, buffered="off" if name == "push-object" else "on")
        for name, size in sizes.items()
    )
    keys = "".join(
        f'\n        "{node_key_header(path.read_bytes())}" {name};' for name, path in server.node_public_keys().items()
    )
    return _CONFIGURATION.format(
        **paths, limits=limits, listen=listen, superlink=superlink, user=_unprivileged(), calls=calls, keys=keys
    )


def _unprivileged() -> str:
    """The workers' user where the master is root; the master only opens the port, the logs and the keys."""
    if os.geteuid() != 0:
        return ""
    import grp
    import pwd

    nobody = pwd.getpwnam("nobody")
    return f"user nobody {grp.getgrgid(nobody.pw_gid).gr_name};"


_CALL = """
        location = {path} {{
            limit_except POST {{ deny all; }}
            client_max_body_size {size};
            proxy_request_buffering {buffered};
            proxy_pass https://superlink{path};
        }}
"""

_CONFIGURATION = """\
# Written by fedferret (sites/proxy.py) at every start; changes made here are lost.
daemon off;
{user}
worker_processes 1;
worker_shutdown_timeout 5s;
pid "{folder}/nginx.pid";
error_log "{folder}/error.log" warn;

events {{
    worker_connections {limits.connections};
}}

http {{
    map_hash_bucket_size 1024;  # a node key has 288 characters

    # One line for each refusal, none for the calls that a node makes every few seconds.
    map $status $refused {{ ~^[23] 0; default 1; }}
    log_format refusals '$time_iso8601 $remote_addr "$ssl_client_s_dn" $ssl_client_verify $request_method $uri $status';
    access_log "{folder}/refused.log" refusals if=$refused;

    # The site that a certificate names, and the site that a call's node key was issued to; a call without a key
    # reaches SuperLink, which refuses it.
    map $ssl_client_s_dn $site {{
        "~^CN=(?<name>[a-z0-9-]+)," $name;
        default "";
    }}
    map $http_flwr_public_key $owner {{
        default "nobody";
        "" $site;{keys}
    }}

    server_tokens off;
    client_body_temp_path "{folder}/temporary/body";
    proxy_temp_path "{folder}/temporary/proxy";
    fastcgi_temp_path "{folder}/temporary/fastcgi";
    uwsgi_temp_path "{folder}/temporary/uwsgi";
    scgi_temp_path "{folder}/temporary/scgi";

    client_max_body_size {limits.call};
    client_body_buffer_size {limits.call};
    limit_conn_zone $ssl_client_s_dn zone=certificates:1m;
    limit_conn_zone $binary_remote_addr zone=addresses:1m;
    limit_req_zone $ssl_client_s_dn zone=rates:1m rate={limits.rate}r/s;
    limit_conn certificates {limits.requests};
    limit_conn addresses {limits.requests_of_address};
    limit_req zone=rates burst={limits.burst} nodelay;
    client_header_timeout {limits.header_seconds}s;
    client_body_timeout {limits.idle_seconds}s;
    send_timeout {limits.idle_seconds}s;

    upstream superlink {{
        server {superlink};
    }}

    server {{
        listen {listen} ssl;

        ssl_protocols TLSv1.2 TLSv1.3;
        ssl_ciphers ECDHE-ECDSA-AES256-GCM-SHA384:ECDHE-ECDSA-CHACHA20-POLY1305:ECDHE-ECDSA-AES128-GCM-SHA256;
        ssl_certificate "{certificate}";
        ssl_certificate_key "{key}";
        ssl_client_certificate "{authority}";
        ssl_crl "{revocations}";
        ssl_verify_client on;
        ssl_verify_depth 1;
        ssl_session_cache off;
        ssl_session_tickets off;

        proxy_http_version 1.1;
        proxy_ssl_verify on;
        proxy_ssl_verify_depth 1;
        proxy_ssl_trusted_certificate "{authority}";
        proxy_ssl_protocols TLSv1.2 TLSv1.3;
        proxy_ssl_name localhost;
        proxy_ssl_server_name on;
        proxy_ssl_session_reuse off;
        proxy_set_header Host localhost;
        proxy_set_header X-Forwarded-For $remote_addr;
        proxy_set_header X-Forwarded-Proto https;
        proxy_max_temp_file_size 0;
        proxy_next_upstream off;
        proxy_connect_timeout 5s;
        proxy_send_timeout {limits.idle_seconds}s;
        proxy_read_timeout {limits.idle_seconds}s;

        if ($owner != $site) {{
            return 403;
        }}
{calls}
        location / {{
            return 404;
        }}
    }}
}}
"""
