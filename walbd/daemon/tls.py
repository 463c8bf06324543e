"""TLS 1.3 with certificates on both sides."""

from __future__ import annotations

import ssl

from walbd.errors import ConfigError


def mutual_tls(cert: str, key: str, ca: str, *, server: bool) -> ssl.SSLContext:
    """Make the context from three PEM files; the peer must show a certificate that `ca` has signed.

    Raises ConfigError when a file cannot be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_cert_chain(cert, key)
        context.load_verify_locations(ca)
    except (OSError, ssl.SSLError) as exc:
        raise ConfigError("cannot load the TLS files", reason=str(exc), tls_cert=cert) from exc
    return context
