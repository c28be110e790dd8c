"""nginx's configuration for the port that sites call, as text.

Flower 1.41 serves nodes, operators and apps on one port, and operators need no login: whoever reaches ``/v1/control``
can start code on every node. So SuperLink listens on loopback, and ``FLEET`` names each call that nginx passes on to it
(``flwr/supernode/fleet_http_client.py``, ``flwr/superlink/routers/fleet/router.py``). nginx passes a call on under the
path in this configuration, however the client spelt it. Registering and unregistering are not among the calls:
the server registers nodes, by their public keys. A call must carry the node key that was issued together with the
certificate: a node key that was stolen from a site is of no use with another site's certificate.

Requests and responses stay in memory: nginx writes no update of a site to disk. nginx checks certificates at every
connection and resumes no TLS session, so that a revoked certificate is refused once nginx has read the list.
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


@dataclass(frozen=True)
class Limits:
    """The proxy's limits for a site with a certificate."""

    body: int = 256 << 20  # bytes of one request; an adapter of a 7B model has 80 MB; SuperLink holds it in memory
    header_seconds: int = 20  # for the handshake and a request's head: a site with a bad connection needs three
    idle_seconds: int = 60  # between two reads or writes; flwr gives up after 30
    connections: int = 512  # in all, two for each site's request; nginx's default, below common limits of open files


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
    calls = "".join(_CALL.format(path=f"/v1/fleet/{name}") for name in FLEET)
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

    client_max_body_size {limits.body};
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
        proxy_request_buffering off;
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
