"""`dfrot-lab leaderboard`: every rotation, free extra and weight quantizer, ranked within its group."""

from typing import Annotated

import typer

from dfrot_lab.cli.options import MANY, Options, command

GROUP = (
    "One of the groups alone: fused R1, free extras, no rotation, online; 'fused R1, 4-bit weights', so for "
    "no rotation and online; weight quantizers, few-bit weights. All without it."
)


@command("leaderboard", f"{MANY} gamma rule")
def leaderboard_command(
    said: Options, group: Annotated[str, typer.Option(help=GROUP)] = "",
    quick: Annotated[bool, typer.Option("--quick", help="A few short windows, to see it work.")] = False,
) -> None:  # fmt: skip
    """Every rotation under one pipeline, ranked by KL divergence, each with a verdict against RH.

    Hours on a CPU: what is finished is kept, and the same command goes on. --out: the whole table, .csv,
    .parquet, .json. Groups are not compared with each other: what they cost when the model runs differs."""
    from dfrot_lab.disk.artefacts import Store
    from dfrot_lab.study import experiments, leaderboard

    if group and group not in leaderboard.GROUPS:
        raise ValueError(f"--group must be one of {', '.join(leaderboard.GROUPS)}; got {group!r}")
    said.require_table()
    asked = said.setting().resolved()
    setting = experiments.setting_of("leaderboard", said.quickened(asked) if quick else asked)
    chosen = [group] if group else list(leaderboard.GROUPS)
    table = leaderboard.leaderboard(setting, Store(), chosen)
    said.show_table(leaderboard.ranked(table), {"out": said.out}, table, most=None)
