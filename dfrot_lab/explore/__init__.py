"""Explorers: functions that return a widget to look, touch and teach with in JupyterLab. `explore.massive(acts)`, `explore.errors(acts)`, ..."""

from .generate import generate as generate
from .worth import worth as worth
