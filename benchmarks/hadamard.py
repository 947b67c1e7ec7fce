"""The online Hadamard transforms (R3, R4) against the dense matrix product and against the linear they feed:
`python benchmarks/hadamard.py`.
"""

import torch
from common import Row, options, report, seconds

from dfrot_lab.maths.hadamard import _stages, hadamard_matrix, hadamard_transform
from dfrot_lab.model.malloc import keep_freed_memory
from dfrot_lab.study.cost import measure_machine

TOKENS = 2048
CASES = (
    ("R4, SmolLM2-135M: 1536 = 12 x 128, down_proj", 1536, 1536, 1536, 576),
    ("R4, LLaMA-2-7B: 11008 = 172 x 64, down_proj", 11008, 11008, 11008, 4096),
    ("R4, LLaMA-3-8B: 14336 = 28 x 512, down_proj", 14336, 14336, 14336, 4096),
    ("R3, heads of 64, SmolLM2-135M: q_proj and k_proj", 64, 768, 576, 768),
    ("R3, heads of 128, LLaMA-2-7B: q_proj and k_proj", 128, 8192, 4096, 8192),
)
"""(what, order n, channels transformed a token, linear's inputs, linear's outputs)."""


def main() -> None:
    """Measure and print."""
    given = options(__doc__).parse_args()
    keep_freed_memory()
    rates, rows = measure_machine(), []
    for what, n, width, inputs, outputs in CASES:
        x, y, weight = (
            torch.randn(TOKENS * width // n, n),
            torch.randn(TOKENS, inputs),
            torch.randn(outputs, inputs),
        )
        H = hadamard_matrix(n, dtype=torch.float32)
        ours = seconds(lambda x=x, n=n: hadamard_transform(x, n**-0.5), runs=9)
        linear = seconds(lambda y=y, weight=weight: torch.nn.functional.linear(y, weight), runs=9)
        dense = seconds(lambda x=x, H=H, n=n: (x @ H.T).mul_(n**-0.5))
        flops = 2 * TOKENS * width * sum(torch.tensor(stage).prod().item() for stage in _stages(n))
        floor = max(flops / rates.float_rate, 2 * 4 * TOKENS * width / rates.byte_rate)
        rows.append(
            Row(
                "Hadamard",
                f"{what} of {TOKENS} tokens: transform / linear",
                ours,
                linear,
                bar=0.1,
                floor=floor,
            )
        )
        rows.append(
            Row("Hadamard", f"n = {n}: dense matrix / transform", ours, dense, at_least=True, floor=floor)
        )
    report(rows, given.out)


if __name__ == "__main__":
    main()
