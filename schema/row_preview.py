"""How a stored row is shown to people: without the bytes of its images."""

from typing import cast


def shorten_images(value: object) -> object:
    """A value of a stored row, whose images are replaced by their type and size."""
    match value:
        case {"type": "image", "image": str(uri)} if uri.startswith("data:image/"):  # not arguments that look like one
            header, _, payload = uri.partition(",")
            size_bytes = len(payload) * 3 // 4 - payload[-2:].count("=")
            return {"type": "image", "image": f"{header},… ({size_bytes} bytes)"}
        case dict():
            return {name: shorten_images(inner) for name, inner in cast(dict[str, object], value).items()}
        case list():
            return [shorten_images(inner) for inner in cast(list[object], value)]
        case _:
            return value
