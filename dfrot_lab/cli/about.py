"""Commands that say what is here: models, fetch, doctor."""

from typing import Any

import typer

from dfrot_lab.cli.options import Corpus, Dtype, Json, Model, Out, app, clear_errors
from dfrot_lab.cli.output import show_facts
from dfrot_lab.recipe.specs import DEFAULT_MODEL, CorpusSpec, ModelSpec


@app.command("models")
def models_command(
    model: Model = DEFAULT_MODEL, out: Out = None, as_json: Json = False, dtype: Dtype = "float32"
) -> None:
    """What can be loaded: supported and refused families with the reason; then --model itself, described."""
    from dfrot_lab.model import loading
    from dfrot_lab.model.families import FAMILIES, REFUSED

    with clear_errors():
        loaded = loading.load_model(ModelSpec(source=model, dtype=dtype))
        about: dict[str, Any] = {"model": model, "family": loaded.family, "provenance": loaded.provenance}
        about |= {"channels": loaded.channels, "layers": len(loaded.layers), "context": loaded.context}
        about |= {"fingerprint": loaded.fingerprint, "supported": list(FAMILIES), "refused": REFUSED}
        show_facts(about, out, as_json)


@app.command()
def fetch(
    model: Model = DEFAULT_MODEL, corpus: Corpus = "auto", out: Out = None, as_json: Json = False
) -> None:
    """Fetch and convert the model and the corpus now, so that everything else works without a network."""
    from dfrot_lab.model import corpus as corpora
    from dfrot_lab.model import loading

    with clear_errors():
        loaded = loading.load_model(ModelSpec(source=model))
        halves = [
            corpora.resolve(CorpusSpec(name=corpus, split=split)) for split in ("calibration", "evaluation")
        ]
        sizes = {
            f"{spec.name} {spec.split}": f"{len(corpora.load_text(spec)):,} characters" for spec in halves
        }
        show_facts({"model": model, "provenance": loaded.provenance, **sizes}, out, as_json)


@app.command()
def doctor(
    model: Model = DEFAULT_MODEL, corpus: Corpus = "auto", out: Out = None, as_json: Json = False
) -> None:
    """Versions, cores, memory, what is cached, what is missing; exit code 1 if the main job could not run."""
    from dfrot_lab.cli.doctor import checkup

    with clear_errors():
        about, missing = checkup(ModelSpec(source=model), CorpusSpec(name=corpus))
        show_facts({**about, "missing": missing or "nothing"}, out, as_json)
        if missing:
            raise typer.Exit(1)
