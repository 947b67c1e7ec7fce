"""What every explorer is made of: state and controls, status, work in the background, plots, words."""
