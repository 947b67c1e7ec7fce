"""The refinement explorer: refine R1 live."""
