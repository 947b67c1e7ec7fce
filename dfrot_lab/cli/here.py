"""What is here: models and texts that can be used, fetched, and what is missing."""

from typing import Any

import typer

from dfrot_lab.cli.options import Options, command
from dfrot_lab.recipe import specs


@command("models", "model out as_json dtype")
def models(said: Options) -> None:
    """What can be loaded: supported and refused families with the reason; then --model itself, described."""
    from dfrot_lab.model import families, loading, public

    loaded, spec = loading.load_model(said.model_spec), said.model_spec
    about: dict[str, Any] = {"model": public.public(spec).source, "family": loaded.family}
    about["provenance"] = public.origin(loaded.provenance, spec)
    about |= {"channels": loaded.channels, "layers": len(loaded.layers), "context": loaded.context}
    about |= {"fingerprint": loaded.fingerprint, "packaged": [*specs.PACKAGED]}
    said.show_facts({**about, "supported": [*families.FAMILIES], "refused": families.REFUSED}, said.out)


@command("fetch", "model corpus out as_json dtype")
def fetch(said: Options) -> None:
    """Fetch and convert the model and the corpus now, so that everything else works without a network."""
    from dfrot_lab.model import corpus, loading, public

    provenance = public.origin(loading.load_model(said.model_spec).provenance, said.model_spec)
    about = {"model": public.public(said.model_spec).source, "provenance": provenance}
    for split in ("calibration", "evaluation"):
        spec = corpus.resolve(specs.CorpusSpec(name=said.corpus, split=split))
        about[f"{public.public(spec).name} {split}"] = f"{len(corpus.load_text(spec)):,} characters"
    said.show_facts(about, said.out)


@command("doctor", "model corpus out as_json dtype")
def doctor(said: Options) -> None:
    """Versions, cores, memory, what is cached, what is missing; exit code 1 if the main job could not run."""
    from dfrot_lab.cli.doctor import checkup

    about, missing = checkup(said.model_spec, specs.CorpusSpec(name=said.corpus))
    said.show_facts({**about, "missing": "; ".join(missing) or "nothing"}, said.out)
    if missing:
        raise typer.Exit(1)
