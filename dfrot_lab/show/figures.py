"""Every static picture under one name, for notebooks and explorers: draw inside `with figures.theme():`."""

import matplotlib.pyplot as plt

from dfrot_lab.show.perplexity import FAR, figure_perplexity, plot_perplexity
from dfrot_lab.show.theme import theme
from dfrot_lab.show.theory import plot_logit_errors, plot_predicted_rows, plot_prediction
from dfrot_lab.show.tokens import (
    figure_errors,
    figure_massive_token,
    plot_error_pair,
    plot_history,
    plot_massive_values,
    plot_residual,
    plot_seed_spread,
    plot_token_roots,
    plot_value_counts,
)
