"""Links that this service itself serves, for object stores that cannot sign any."""

from service.core.tokens import TokenSigner


class ServiceLinks:
    """`/files/{token}`: the token says which object, and until when."""

    def __init__(self, tokens: TokenSigner) -> None:
        self._tokens = tokens

    def link(self, key: str, filename: str, expires_s: int) -> str:
        return f"/files/{self._tokens.file_token(key, filename, expires_s)}"
