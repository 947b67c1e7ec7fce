"""How far rounding alone moves a 4-bit perplexity: `python benchmarks/jitter.py [--windows 2] [--jitters 3]`.

Scores RO and RH at 16-4-16 on the same windows, as they are and with the embedding changed in its last bit
(`Recipe.jitter`). Values that sit on the edge between two codes fall the other way, and the model amplifies
that. `dfrot-lab experiment measuring` tells it beside the other noise of a comparison.
"""

import argparse

from dfrot_lab import recipe_of
from dfrot_lab.recipe.specs import CorpusSpec, RotationSpec
from dfrot_lab.score.perplexity import evaluate


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--jitters", type=int, default=3)
    options = parser.parse_args()
    text = CorpusSpec(name="wikipedia-sample")
    for kind in ("RO", "RH"):
        spec = recipe_of("16-4-16", corpus=text, rotation=RotationSpec(kind=kind), windows=options.windows)
        jitters = (None, *range(1, options.jitters + 1))
        found = [evaluate(spec.with_(jitter=jitter)).perplexity for jitter in jitters]
        spread = (max(found) - min(found)) / found[0]
        values = ", ".join(f"{value:.2f}" for value in found)
        print(f"{kind} 16-4-16, {spec.windows} windows: {values}: a spread of {100 * spread:.1f}%")


if __name__ == "__main__":
    main()
