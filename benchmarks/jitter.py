"""How far rounding alone moves a 4-bit perplexity: `python benchmarks/jitter.py [--windows 2] [--jitters 3]`.

Multiplies the embedding by 1 + 1e-7 N(0, 1), about the last bit of float32, and scores RO and RH at 16-4-16
again on the same windows. Values that sit on the edge between two codes fall the other way, and the model
amplifies that: noise that an interval over windows does not contain.
"""

import argparse

import numpy as np
import torch

from dfrot_lab import recipe_of
from dfrot_lab.disk.artefacts import Store
from dfrot_lab.model import corpus
from dfrot_lab.recipe.specs import CorpusSpec, RotationSpec
from dfrot_lab.score.build import build, quantized
from dfrot_lab.score.perplexity import window_loss

RELATIVE = 1e-7


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--jitters", type=int, default=3)
    options = parser.parse_args()
    for kind in ("RO", "RH"):
        spec = recipe_of(
            "16-4-16",
            corpus=CorpusSpec(name="wikipedia-sample"),
            rotation=RotationSpec(kind=kind),
            windows=options.windows,
        )
        built = build(spec, Store())
        ids = corpus.token_blocks(
            spec.corpus, built.loaded.tokenizer, blocks=spec.windows, window=spec.window
        )
        embedding = built.loaded.model.get_submodule(built.loaded.roles.embedding).weight.data
        exact = embedding.clone()
        found = []
        for seed in range(options.jitters + 1):
            noise = (
                torch.randn(exact.shape, generator=torch.Generator().manual_seed(seed))
                if seed
                else torch.zeros(1)
            )
            embedding.copy_(exact * (1 + RELATIVE * noise))
            with quantized(built, spec):
                found.append(float(np.exp(np.mean([window_loss(built.loaded, window) for window in ids]))))
        spread = (max(found) - min(found)) / found[0]
        values = ", ".join(f"{value:.2f}" for value in found)
        print(f"{kind} 16-4-16, {spec.windows} windows: {values}: a spread of {100 * spread:.1f}%")


if __name__ == "__main__":
    main()
