"""Steps of surgery, switched on and off."""
