"""An emulator of Cloud Run jobs: it serves google.cloud.run.v2 over gRPC and runs every task as a child process.

Here belongs the part of the API that Tunesmith uses, as a client sees it: names, the environment and arguments of an execution, lists
with the newest first, conditions with Cloud Run's own messages, SIGTERM followed by SIGKILL, the time limit, retries. A container is a
process group here, so containers share one file system: a variable that names a folder gets a folder per execution.
"""
