"""What went wrong, in one line."""

LONGEST = 500  # characters of an error that are shown


def one_line(text: str) -> str:
    """Text as one line: what cannot be printed as its escape, and the middle cut out of what is too long."""
    half = LONGEST // 2
    if len(text) > LONGEST:
        text = f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def line_of(error: Exception) -> str:
    """What went wrong, without a traceback: in our own words, else the kind of error with its own."""
    said = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    if isinstance(error, ValueError | OSError | RuntimeError | KeyError) and " " in said:
        return said
    if isinstance(error, ImportError):
        return f"{said}. Something of the install is missing: install what locks/ names (CUDA: cuda.txt)"
    why = f"{type(error).__name__}: {' '.join(said.split())[:300] or 'no reason given'}"
    return f"{why}. No rule forbids this, so it is a fault here: dfrot-lab --verbose COMMAND says where"
