"""What every explorer is made of: a state whose traits declare their controls, a status line, work off the
kernel's thread, plots that follow the page, token text that is never run.
"""
