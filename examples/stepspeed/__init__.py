"""How long a step of each optimizer takes, without a network, and what memory it needs."""
