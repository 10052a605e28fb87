"""Objects as files, behind another scheme: `toy:///absolute/path`."""

from storage.file import LocalStore


class ToyStore(LocalStore):
    def __init__(self, url: str) -> None:
        super().__init__(url.replace("toy://", "file://", 1))
        self.url = url.rstrip("/")
