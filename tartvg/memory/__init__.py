"""How much memory a run takes: traced on the policy's own code, then divided as each strategy divides it."""
