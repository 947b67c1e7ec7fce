"""Ask llama.cpp itself what it makes of an exported file, where the package xllamacpp is installed: nothing
else needs it."""

from pathlib import Path
from typing import Any


def is_here() -> bool:
    """Whether llama.cpp can be asked."""
    from importlib.util import find_spec

    return find_spec("xllamacpp") is not None


def server(file: Path, context: int = 512) -> Any:
    """llama.cpp with the model in a GGUF file, windows of `context` tokens, keys and values in full. Ask it
    by `handle_completions`. ValueError: it is not installed, or does not take the file."""
    if not is_here():
        raise ValueError("to ask llama.cpp, the package xllamacpp must be installed: pip install xllamacpp")
    import xllamacpp

    asked = xllamacpp.CommonParams()
    asked.model.path, asked.n_ctx, asked.n_parallel, asked.warmup = str(file), context, 1, False
    asked.verbosity = -1
    asked.cache_type_k = asked.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    asked.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it has 16 bits
    try:
        return xllamacpp.Server(asked)
    except RuntimeError as error:
        raise ValueError(f"llama.cpp cannot load {file}: {error}") from error


def answer(file: Path, prompt: str, tokens: int = 32) -> str:
    """What llama.cpp writes after a prompt, always the likeliest token. ValueError as of `server`."""
    request = {"prompt": prompt, "n_predict": tokens, "temperature": 0}
    return str(server(file).handle_completions(request)["choices"][0]["text"])
