"""The playground: a spike turned by hand, and by matrices."""
