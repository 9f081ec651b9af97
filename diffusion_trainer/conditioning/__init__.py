"""What the network is told besides x_t and t."""
