"""Serve the Cloud Run emulator until SIGTERM or SIGINT, then end every child process.

python -m infra.loopback.cloud_run --folder DIR --python PYTHON --job tunesmith-cpu [--port N] [--source .] [--env K=V …]
"""

import argparse
import signal
import threading
import time
from pathlib import Path

from infra.loopback.cloud_run.server import CloudRun


def main() -> None:
    """Parse the command line and serve."""
    parser = argparse.ArgumentParser(
        prog="python -m infra.loopback.cloud_run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True, help="for the output and the folders of executions")
    parser.add_argument("--python", type=Path, required=True, help="the Python of the trainer's environment")
    parser.add_argument("--source", type=Path, default=Path(), help="where jobs/ is")
    parser.add_argument("--project", default="demo-tunesmith")
    parser.add_argument("--region", default="local")
    parser.add_argument("--job", action="append", required=True, help="a job resource to create; may be repeated")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="for the children; they inherit nothing else")
    options = parser.parse_args()
    source = options.source.resolve()
    environment = dict(pair.split("=", 1) for pair in options.env) | {"PYTHONPATH": str(source), "PYTHONUNBUFFERED": "1"}
    command = [str(options.python.absolute()), "-m", "jobs.run"]
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    with CloudRun(options.folder.resolve(), {"llm": command}, environment=environment, cwd=source, port=options.port) as cloud_run:
        for name in options.job:
            cloud_run.create_job(f"projects/{options.project}/locations/{options.region}/jobs/{name}", "llm")
        print(f"{time.strftime('%H:%M:%S')} Cloud Run emulator on {cloud_run.host}: {', '.join(options.job)}", flush=True)
        stopped.wait()


if __name__ == "__main__":
    main()
