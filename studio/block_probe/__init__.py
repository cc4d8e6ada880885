"""The block probe: what each attention block of a base model carries, content or style."""
