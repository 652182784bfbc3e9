"""Training from a stream: samples that come one after the other, and no list of them."""
