"""One run on several processes or machines: who they are, how they talk, and what they agree on."""
