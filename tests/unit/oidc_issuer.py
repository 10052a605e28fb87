"""An OpenID Connect issuer on loopback, with real keys: its discovery document, its key set and its tokens."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

AUDIENCE = "https://tunesmith.example.com"


class OidcIssuer:
    """Signs tokens with its current key; old keys stay published."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.fetches = 0
        self.is_down = False
        self._keys: dict[str, Any] = {}
        self.current = ""
        self.rotate()

    def rotate(self, *, elliptic: bool = False) -> None:
        """Make a new key the current one."""
        self.current = f"k{len(self._keys)}"
        key = ec.generate_private_key(ec.SECP256R1()) if elliptic else rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self._keys[self.current] = key

    def sign(self, now: datetime, *, lifetime: timedelta = timedelta(hours=1), **claims: object) -> str:
        """A token; `claims` replace or, if None, remove what it usually has."""
        usual = {
            "iss": self.url,
            "aud": AUDIENCE,
            "sub": "1234",
            "email": "ada@example.com",
            "email_verified": True,
            "iat": now,
            "exp": now + lifetime,
        }
        payload = {name: value for name, value in (usual | claims).items() if value is not None}
        key = self._keys[self.current]
        algorithm = "ES256" if isinstance(key, ec.EllipticCurvePrivateKey) else "RS256"
        return jwt.encode(payload, key, algorithm=algorithm, headers={"kid": self.current})

    def public_pem(self) -> bytes:
        """The current public key, as everybody can read it."""
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

        return self._keys[self.current].public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    def document(self, path: str) -> dict[str, Any] | None:
        """What the issuer serves at a path."""
        self.fetches += 1
        if self.is_down:
            return None
        if path == "/.well-known/openid-configuration":
            return {"issuer": self.url, "jwks_uri": f"{self.url}/keys"}
        return {"keys": [self._render_key(key_id) for key_id in self._keys]} if path == "/keys" else None

    def _render_key(self, key_id: str) -> dict[str, Any]:
        public = self._keys[key_id].public_key()
        is_elliptic = isinstance(public, ec.EllipticCurvePublicKey)
        rendered = ECAlgorithm.to_jwk(public) if is_elliptic else RSAAlgorithm.to_jwk(public)
        return json.loads(rendered) | {"kid": key_id, "use": "sig", "alg": "ES256" if is_elliptic else "RS256"}


@contextmanager
def serve_issuer() -> Iterator[OidcIssuer]:
    """An issuer that answers on loopback while the block runs."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            document = issuer.document(self.path)
            body = json.dumps(document or {}).encode()
            self.send_response(200 if document is not None else 503)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    issuer = OidcIssuer(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield issuer
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
