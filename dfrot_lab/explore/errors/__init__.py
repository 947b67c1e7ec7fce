"""The errors explorer: every token's quantization error under two rotations or three."""
