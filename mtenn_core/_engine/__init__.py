"""How each mode takes gradients, and what they share."""
