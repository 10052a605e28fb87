"""`python -m jobs.llm.data.render_process REQUEST RESPONSE`: render one part of a split. Both are JSON files of `rendering.py`.

A row that cannot be rendered is in the response; exit code 0 means that the response is written.
"""

import pickle
import sys
from pathlib import Path

from jobs.llm.data.rendering import RenderRequest, RenderResponse, RenderSettings, render_range
from jobs.runtime.errors import JobFailed


def main(request_path: Path, response_path: Path) -> None:
    """Render the requested lines."""
    request = RenderRequest.load(request_path.read_bytes())
    settings = pickle.loads(Path(request.settings).read_bytes())  # noqa: S301  # the attempt's own process wrote it
    assert isinstance(settings, RenderSettings)
    try:
        response = render_range(settings, Path(request.rows), request.start, request.end, Path(request.target))
    except JobFailed as error:
        response = RenderResponse(failure=error.failure)
    response_path.write_text(response.model_dump_json())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
