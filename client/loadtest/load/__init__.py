"""What is sent, and when: arrivals, prompts, lengths, misbehaviour, traces. Pure, and decided by a seed."""
