# llama-cpp-python is not in the environment that runs pyright; without this file the import resolves to jobs/llm/llama_cpp.
from typing import Any

def __getattr__(name: str) -> Any: ...
