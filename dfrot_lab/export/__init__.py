"""Take it away: a rotated model in the formats that people run."""
